"""A small world of coloured solids: its scenes, the models trained on it, and a judge that reads their pictures."""

from pathlib import Path


MODELS = {name: Path(__file__).parent / name for name in ("sd", "pixart")}  # what ships, a folder a pipeline
ARGUMENTS = {  # what a call for them needs, guided or not
    "sd": {"guidance_scale": 4.0},
    "pixart": {"guidance_scale": 4.0, "use_resolution_binning": False, "clean_caption": False},
}
# T-SAM's arguments for the models that ship, chosen with `benchmarks/alignment.py`: their maps are sharper than a large
# model's, so one update of the paper's size overshoots.
TUNED = {
    "sd": {"schedule": "fast", "alpha": 1.0, "gamma": 4.0},
    "pixart": {"schedule": "fast", "alpha": 0.5, "gamma": 4.0},
}
