"""A small world of coloured solids: its scenes, the models trained on it, and a judge that reads their pictures."""

from pathlib import Path


MODELS = {name: Path(__file__).parent / name for name in ("sd", "pixart")}  # shipped, a folder per pipeline
JOINT_MODEL = Path(__file__).parent / "sd3"  # a small SD3, for the modular blocks' benchmark
SD3_TOKENS = 13  # for CLIP and T5, the same in every call, because SD3 attends to padding
ARGUMENTS = {  # of their calls, guided or not
    "sd": {"guidance_scale": 4.0},
    "pixart": {"guidance_scale": 4.0, "use_resolution_binning": False, "clean_caption": False},
}
# T-SAM's settings for the shipped models; "sink" is `sd` with sink.py's weights. The paper's settings, chosen for large
# models, overshoot on these, because their maps are sharper.
TUNED = {name: {"preset": "fast"} for name in ("sd", "pixart", "sink", "sd3")}
SOLIDS = ("cube", "sphere", "cone", "cylinder", "ring", "star")
COLOURS = {
    "red": (205, 40, 40),
    "green": (45, 150, 60),
    "blue": (45, 75, 205),
    "yellow": (235, 210, 50),
    "purple": (135, 50, 165),
    "orange": (240, 130, 30),
    "black": (35, 35, 38),
    "white": (240, 240, 240),
}
WORDS = (*COLOURS, *SOLIDS, "a", "an", "and", "with")  # of the models' training captions


def unknown_words(prompt):
    """The words of a prompt that the shipped models did not train on, each once; most are spelled in letters."""
    words = (word.strip(".,;:!?-–—\"'()") for word in prompt.split())
    return [word for word in dict.fromkeys(words) if word and word.lower() not in WORDS]
