"""A small world of coloured solids: its scenes, the models trained on it, and a judge that reads their pictures."""

from pathlib import Path


MODELS = {name: Path(__file__).parent / name for name in ("sd", "pixart")}  # what ships, a folder a pipeline
ARGUMENTS = {  # what a call for them needs, guided or not
    "sd": {"guidance_scale": 4.0},
    "pixart": {"guidance_scale": 4.0, "use_resolution_binning": False, "clean_caption": False},
}


def tuned_setting(steps, pipeline="sd"):
    """T-SAM's arguments for a model that ships at `steps` denoising steps, tuned by `benchmarks/alignment.py`.

    Its maps are sharper than a large model's, so one update of the paper's size overshoots: many small ones, early.
    """
    tsam_steps = max(steps * 20 // 100, 1)
    refinement_steps = {steps * percent // 100 for percent in (0, 8, 16)}
    return {
        "tsam_steps": tsam_steps,
        "alpha": {"sd": 1.0, "pixart": 0.5}[pipeline],
        "gamma": 4.0,
        "refinement_steps": sorted(step for step in refinement_steps if step < tsam_steps),
        "refinement_iterations": 5,
        "objective": "l1",
    }
