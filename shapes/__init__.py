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
WORDS = (*COLOURS, *SOLIDS, "a", "an", "and", "with")  # of the captions that the models were trained on


def unknown_words(prompt):
    """The words of a prompt that the models that ship were not trained on, each once; most are spelled in letters."""
    words = (word.strip(".,;:!?-–—\"'()") for word in prompt.split())
    return [word for word in dict.fromkeys(words) if word and word.lower() not in WORDS]
