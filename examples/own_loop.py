"""T-SAM in a denoising loop of your own, for what the pipeline has no argument for: here, an α that fades out.

With a constant α, this loop draws bit for bit what the pipeline's call draws. It saves the call's picture, its own, and
the one of the fading α.

    python examples/own_loop.py
"""

import argparse

import numpy as np
import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import LatentAlignment, StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import MODELS


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), 512 pixels, α 10, γ 2, guidance 7.5
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
prompt, alpha, gamma, guidance_scale = "a red cube and a blue sphere", 1.0, 4.0, 4.0
guided, refined, iterations = max(args.steps // 5, 1), [0], 8  # steps from the first; steps with 8 more updates
noise = pipe.prepare_latents(1, 4, 64, 64, pipe.dtype, pipe.device, torch.Generator().manual_seed(74))


@torch.no_grad()
def draw(alpha_at):
    """The picture whose latents are moved by `alpha_at(i)` before step i."""
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(prompt, pipe.device, 1, True)
    prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
    alignment = LatentAlignment(pipe.get_text_self_attention(prompt), pipe.settings(alpha=alpha, gamma=gamma))
    layers, conditions = pipe.cross_attention_layers(16), {"encoder_hidden_states": prompt_embeds}
    pipe.scheduler.set_timesteps(args.steps, device=pipe.device)
    latents = noise
    for i, t in enumerate(pipe.scheduler.timesteps):
        if i < guided:
            alignment.alpha = alpha_at(i)
            updates = 1 + iterations * (i in refined)
            latents = pipe.align_latents(alignment, latents, t, (t,), conditions, layers, updates)
        model_input = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
        unconditional, conditional = pipe.unet(model_input, t, **conditions).sample.chunk(2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        latents = pipe.scheduler.step(prediction, t, latents).prev_sample
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(image, output_type="np")[0]


settings = {"num_inference_steps": args.steps, "guidance_scale": guidance_scale, "alpha": alpha, "gamma": gamma}
settings |= {"tsam_steps": guided, "refinement_steps": refined, "refinement_iterations": iterations}
called = pipe(prompt, latents=noise, output_type="np", **settings).images[0]
own, fading = draw(lambda i: alpha), draw(lambda i: alpha * (1 - i / guided))
pictures = pipe.numpy_to_pil(np.stack([called, own, fading]))
make_image_grid(pictures, rows=1, cols=3, resize=256).save("own_loop.png")
