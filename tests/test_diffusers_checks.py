"""The checks that diffusers makes of its own pipelines, under its names, on both of ours with guidance on.

The others of its `PipelineTesterMixin` and of its tests of Stable Diffusion and PixArt-α are laws of test_pipelines.py,
test_pipeline_pixart.py, test_loading.py and test_compatibility.py. Not made: test_save_load_dduf (diffusers loads none
any more); test_to_dtype, test_save_load_float16, test_cfg, and the tests of variants, of xformers and of equivalent
inputs and outputs, which nothing here could change.
"""

import pytest
import torch

from kinds import INPUTS, KINDS, PROMPT, SHORT, denoiser_of, embeddings, make, models_of, run


def draw(pipe, prompt=PROMPT, **options):
    return run(
        pipe, prompt, **{"num_inference_steps": 2, "refinement_iterations": 1, "height": 32, "width": 32} | options
    )


def without(kind, *names):
    return make(kind.tsam, {**kind.components, **dict.fromkeys(names)})


def given_for(pipe, prompt):
    """The arguments that stand for a prompt, T among them."""
    return {**embeddings(pipe, prompt), "text_self_attention": pipe.get_text_self_attention(prompt)}


def equal(output, expected):
    return torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)


def test_components_function(kind, pipe):
    used = {name for name, component in pipe.components.items() if component}
    assert used == {name for name, component in kind.components.items() if component}
    again = kind.tsam(**pipe.components)
    assert all(again.components[name] is component for name, component in pipe.components.items())
    assert torch.equal(draw(make(kind.tsam, again.components)).images, draw(pipe).images)


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


@pytest.mark.parametrize("all_of_them", [True, False])
def test_callback_inputs(pipe, all_of_them):
    names = pipe._callback_tensor_inputs if all_of_them else ["latents"]

    def clear_at_the_end(one, step, t, tensors):
        assert one is pipe and list(tensors) == names and all(map(torch.is_tensor, tensors.values()))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else tensors

    output = draw(pipe, callback_on_step_end=clear_at_the_end, **{INPUTS: names})
    assert not output.images.any() and output.losses.shape == (1, 2)


@pytest.mark.parametrize("kind", [KINDS["sd"]], ids=["sd"])  # stock PixArt-α has neither callbacks nor this property
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
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found, expected = latents.clone(), draw(pipe, [PROMPT, SHORT], seed=0)
    output = draw(pipe, [PROMPT, SHORT], latents=latents)
    assert torch.equal(latents, found)  # guidance moves a copy
    assert equal(output, expected)
    with torch.no_grad():
        decoded = pipe.vae.decode(output.images / pipe.vae.config.scaling_factor).sample
    pictures = draw(pipe, [PROMPT, SHORT], latents=latents, output_type="pt").images
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1))


def test_pipeline_in_training_mode_stays_in_it(own):
    denoiser = denoiser_of(own).train()
    assert draw(own).images.isfinite().all() and denoiser.training
