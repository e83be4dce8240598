"""The checks that diffusers makes of its own pipelines, under its names, on both of ours with guidance on.

The others of its `PipelineTesterMixin` and of its tests of Stable Diffusion and PixArt-α are laws of test_pipelines.py,
test_families.py, test_loading.py and test_compatibility.py. Not made: test_save_load_dduf (diffusers loads none
any more); test_to_dtype, test_save_load_float16, test_cfg, and the tests of variants, of xformers and of equivalent
inputs and outputs, which nothing here could change.
"""

import pytest
import torch

from kinds import PROMPT, SHORT, embeddings, make, models_of, run


def draw(pipe, prompt=PROMPT, **options):
    small = {"num_inference_steps": 2, "refinement_iterations": 1, "height": 32, "width": 32}
    return run(pipe, prompt, **small | options)


def without(kind, *names):
    return make(kind.tsam, {**kind.components, **dict.fromkeys(names)})


def given_for(pipe, prompt):
    """The arguments that stand for a prompt, T among them."""
    return {**embeddings(pipe, prompt), "text_self_attention": pipe.get_text_self_attention(prompt)}


def equal(output, expected):
    return torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)


def test_encode_prompt_works_in_isolation_and_inference_with_embeddings_and_multiple_images(kind, pipe):
    reading, drawing = without(kind, "vae", kind.denoiser), without(kind, "text_encoder", "tokenizer")
    given = given_for(reading, [PROMPT, SHORT])
    assert equal(draw(drawing, None, **given), draw(pipe, [PROMPT, SHORT]))
    output = draw(drawing, None, num_images_per_prompt=2, **given)
    expected = draw(pipe, [PROMPT, SHORT], num_images_per_prompt=2)
    assert len(output.images) == len(output.losses) == 4
    torch.testing.assert_close(output.images, expected.images)
    torch.testing.assert_close(output.losses, expected.losses)


def test_save_load_optional_components(kind, pipe, tmp_path):
    names = kind.tsam._optional_components
    without(kind, *names).save_pretrained(tmp_path)
    again = kind.tsam.from_pretrained(tmp_path)
    assert not any(again.components[name] for name in names)
    assert torch.equal(draw(again, None, **given_for(pipe, PROMPT)).images, draw(pipe).images)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_to_device(own):
    expected, device = draw(own), torch.accelerator.current_accelerator()
    own.to(device)
    assert {model.device.type for model in models_of(own)} == {device.type}
    output = draw(own)
    assert output.images.device.type == device.type and output.losses.device.type == "cpu"
    torch.testing.assert_close(output.losses, expected.losses, rtol=1e-2, atol=1e-2)
    own.to("cpu")
    assert torch.equal(draw(own).images, expected.images)


@pytest.mark.parametrize("kind", ["sd"], indirect=True)  # stock PixArt-α has neither callbacks nor this property
def test_callback_cfg(pipe):
    scales = []

    def increase(one, step, t, tensors):
        scales.append(one.guidance_scale)
        one._guidance_scale += 1.0
        return tensors

    steady = draw(pipe, guidance_scale=3.0).images
    assert not torch.equal(draw(pipe, guidance_scale=3.0, callback_on_step_end=increase).images, steady)
    assert scales == [3.0, 4.0] and pipe.guidance_scale == 3.0 + pipe.num_timesteps


def test_latents_input(pipe):
    prompts, latents = [PROMPT, SHORT], torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found, output = latents.clone(), draw(pipe, prompts, latents=latents)
    assert torch.equal(latents, found)  # guidance moves a copy
    assert equal(output, draw(pipe, prompts, seed=0))
    with torch.no_grad():
        decoded = pipe.vae.decode(output.images / pipe.vae.config.scaling_factor).sample
    pictures = draw(pipe, prompts, latents=latents, output_type="pt").images
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1))
