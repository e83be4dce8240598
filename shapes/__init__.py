"""A small world of coloured solids: its scenes, the models trained on it, and a judge that reads their pictures."""

from pathlib import Path


MODEL = Path(__file__).parent / "sd"  # the Stable Diffusion that ships
GUIDANCE_SCALE = 4.0


def tuned_setting(steps):
    """T-SAM's arguments for the model that ships at `steps` denoising steps, tuned by `benchmarks/alignment.py`.

    Its maps are sharper than Stable Diffusion's, so one update of the paper's size overshoots: many small ones, early.
    """
    tsam_steps = max(steps * 20 // 100, 1)
    refinement_steps = {steps * percent // 100 for percent in (0, 8, 16)}
    return {
        "tsam_steps": tsam_steps,
        "alpha": 1.0,
        "gamma": 4.0,
        "refinement_steps": sorted(step for step in refinement_steps if step < tsam_steps),
        "refinement_iterations": 5,
        "objective": "l1",
    }
