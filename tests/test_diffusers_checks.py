"""The checks that diffusers makes of its own pipelines, under its names, on both of ours with guidance on.

Of its `PipelineTesterMixin` and its tests of Stable Diffusion and PixArt-α, these are made elsewhere:

    test_pipeline_call_signature, test_inference_batch_*, test_num_images_per_prompt, test_karras_schedulers_shape,
    test_dict_tuple_outputs_equivalent, test_stable_diffusion_long_prompt, _height_width_opt, _prompt_embeds,
    _negative_prompt, test_inference_non_square_images                              test_pipelines.py
    test_raises_warning_for_mask_feature                                            test_pipeline_pixart.py
    test_save_load_local, test_from_pipe_*                                          test_loading.py
    test_float16_inference, test_attention_slicing_forward_pass, test_freeu_*, test_fused_qkv_projections, test_vae_*,
    test_ip_adapter, test_model_cpu_offload_forward_pass, test_sequential_cpu_offload_forward_pass,
    test_group_offloading_inference, test_pipeline_level_group_offloading_*, test_layerwise_casting_inference,
    test_stable_diffusion_compile, test_save_load_no_safety_checker, the LoRA and textual inversion testers
                                                                                    test_compatibility.py

Not made: test_save_load_dduf (diffusers loads none any more); test_to_dtype, test_save_load_float16, test_cfg, and the
tests of variants, of xformers and of equivalent inputs and outputs, which nothing here could change.
"""

import pytest
import torch

from kinds import INPUTS, KINDS, PROMPT, SHORT, denoiser_of, embeddings, make, models_of, run


STEPS = {"num_inference_steps": 2, "refinement_iterations": 1, "height": 32, "width": 32}


def draw(pipe, prompt=PROMPT, **options):
    return run(pipe, prompt, **{**STEPS, **options})


def loaded(kind, path, **options):
    pipe = kind.tsam.from_pretrained(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(kind, pipe, path, **options):
    """The pipeline, saved and loaded again."""
    pipe.save_pretrained(path)
    return loaded(kind, path, **options)


def without(kind, names):
    return make(kind.tsam, {**kind.components, **dict.fromkeys(names)})


def given_for(pipe, prompt):
    """The arguments that stand for a prompt, T among them."""
    return {**embeddings(pipe, prompt), "text_self_attention": pipe.get_text_self_attention(prompt)}


def test_components_function(kind, pipe):
    assert {name for name, component in pipe.components.items() if component} == {
        name for name, component in kind.components.items() if component
    }
    again = kind.tsam(**pipe.components)
    assert all(again.components[name] is component for name, component in pipe.components.items())
    assert torch.equal(draw(make(kind.tsam, again.components)).images, draw(pipe).images)


def test_encode_prompt_works_in_isolation(kind, pipe):
    reading, drawing = (without(kind, names) for names in (("vae", kind.denoiser), ("text_encoder", "tokenizer")))
    output = draw(drawing, None, **given_for(reading, [PROMPT, SHORT]))
    expected = draw(pipe, [PROMPT, SHORT])
    assert torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)


def test_save_load_optional_components(kind, pipe, tmp_path):
    given, names = given_for(pipe, PROMPT), kind.tsam._optional_components
    again = saved(kind, without(kind, names), tmp_path)
    assert not any(again.components[name] for name in names)
    assert torch.equal(draw(again, None, **given).images, draw(pipe).images)


def test_inference_with_embeddings_and_multiple_images(pipe):
    given, more = given_for(pipe, [PROMPT, SHORT]), {"num_images_per_prompt": 2}
    output, expected = draw(pipe, None, **given, **more), draw(pipe, [PROMPT, SHORT], **more)
    assert len(output.images) == len(output.losses) == 4
    torch.testing.assert_close(output.images, expected.images)
    torch.testing.assert_close(output.losses, expected.losses)


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


def test_latents_input(kind, pipe):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = latents.clone()
    output = draw(pipe, [PROMPT, SHORT], latents=latents)
    assert torch.equal(latents, found)  # guidance moves a copy
    expected = draw(pipe, [PROMPT, SHORT], seed=0)
    assert torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)
    decoded = pipe.vae.decode(output.images / pipe.vae.config.scaling_factor, return_dict=False)[0].detach()
    pictures = draw(pipe, [PROMPT, SHORT], latents=latents, output_type="pt").images
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1))


def test_pipeline_in_training_mode_stays_in_it(pipe):
    denoiser = denoiser_of(pipe)
    denoiser.train()
    output = draw(pipe)
    assert denoiser.training and output.images.isfinite().all()
    denoiser.eval()
