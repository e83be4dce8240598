"""A LoRA with T-SAM: train one that casts every solid in plaster, then draw with it at scale 0, 0.5 and 1.

A minute and a half on a CPU core. So few steps teach it the white, and cost it some shapes; guidance reads the maps of
the model as the LoRA has changed it, at the scale of the call.

    pip install peft && python examples/lora.py
"""

import argparse

import numpy as np
import torch
from diffusers.utils import convert_state_dict_to_diffusers, make_image_grid
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.shapes.scenes import draw_scene, random_scene


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--training-steps", type=int, default=80)
args = parser.parse_args()

# Train it, as for any Stable Diffusion: pictures of white solids, captions with their colours, two of them empty
torch.manual_seed(0)
rng = np.random.default_rng(0)
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
pipe.unet.requires_grad_(False)
pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
optimizer = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=4e-3)
decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.training_steps)
for _ in pipe.progress_bar(range(args.training_steps)):
    scenes = [random_scene(rng) for _ in range(16)]
    images = np.stack([draw_scene(rng, [("white", solid) for _, solid in scene.solids])[0] for scene in scenes])
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.image_processor.preprocess(images / np.float32(255))).latent_dist.mean
        latents = latents * pipe.vae.config.scaling_factor
        embeds, _ = pipe.encode_prompt(["", ""] + [scene.caption for scene in scenes[2:]], pipe.device, 1, False)
    noise, t = torch.randn_like(latents), torch.randint(1000, (16,))
    prediction = pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, embeds).sample
    torch.nn.functional.mse_loss(prediction, pipe.scheduler.get_velocity(latents, noise, t)).backward()
    optimizer.step(), decay.step(), optimizer.zero_grad()
pipe.save_lora_weights("lora", convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)))

# Use it, as with any pipeline; for Stable Diffusion 1.5, load a LoRA of your own in its place
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
pipe.load_lora_weights("lora")
prompts = ["a red cube and a blue sphere", "a yellow cylinder and a purple star"]
settings = {"preset": "fast"} | ARGUMENTS["sd"] | {"num_inference_steps": args.steps}
pictures = []
for scale in (0.0, 0.5, 1.0):
    settings["generator"] = [torch.Generator().manual_seed(seed) for seed in (74, 1)]
    pictures += pipe(prompts, cross_attention_kwargs={"scale": scale}, **settings).images
make_image_grid(pictures, rows=3, cols=2, resize=256).save("lora.png")
