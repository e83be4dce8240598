"""A small world of coloured solids: its scenes, the models trained on it, and a judge that reads their pictures."""

from pathlib import Path


MODELS = {name: Path(__file__).parent / name for name in ("sd", "pixart")}  # what ships, a folder a pipeline
JOINT_MODEL = Path(__file__).parent / "sd3"  # a small SD3, for the modular blocks' benchmark
ARGUMENTS = {  # what a call for them needs, guided or not
    "sd": {"guidance_scale": 4.0},
    "pixart": {"guidance_scale": 4.0, "use_resolution_binning": False, "clean_caption": False},
}
# T-SAM's settings for the models that ship, chosen on tuning prompts (benchmarks/RESULTS.md): their maps are sharper
# than a large model's, so that updates of the paper's size overshoot. "sink": `sd` with the weights of sink.py.
TUNED = {
    "sd": {"preset": "light", "alpha": 4.0},
    "pixart": {"preset": "light"},
    "sink": {"preset": "light"},
}
