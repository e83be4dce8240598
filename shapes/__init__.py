"""A small world of coloured solids: its scenes, the models trained on it, and a judge that reads their pictures."""

from pathlib import Path


MODELS = {name: Path(__file__).parent / name for name in ("sd", "pixart")}  # what ships, a folder a pipeline
JOINT_MODEL = Path(__file__).parent / "sd3"  # a small SD3, for the modular blocks' benchmark
SD3_TOKENS = 13  # of CLIP and of T5: SD3 attends to padding, so that the number has to be the same in every call
ARGUMENTS = {  # what a call for them needs, guided or not
    "sd": {"guidance_scale": 4.0},
    "pixart": {"guidance_scale": 4.0, "use_resolution_binning": False, "clean_caption": False},
}
# T-SAM's settings for the models that ship; "sink" is `sd` with the weights of sink.py. The paper's were chosen for
# large models and overshoot on these, because their maps are sharper.
TUNED = {name: {"preset": "fast"} for name in ("sd", "pixart", "sink", "sd3")}
