"""The checks that diffusers makes of its own pipelines, under its names, on both of ours with guidance on.

Of its `PipelineTesterMixin` and its tests of Stable Diffusion and PixArt-α, these are made elsewhere:

    test_pipeline_call_signature                        test_pipelines.py: TestOff.test_the_signature_is_stock_and_more
    test_inference_batch_consistent, _single_identical  TestBatches.test_an_image_in_a_batch_is_the_same_image_alone
    test_num_images_per_prompt                          TestBatches.test_several_images_a_prompt_are_prompt_major,
                                                        test_properties.py
    test_dict_tuple_outputs_equivalent                  TestOutput.test_the_tuple_has_the_same_things
    test_float16_inference                              TestPrecision
    test_karras_schedulers_shape                        TestGuidance.test_guidance_moves_..._under_every_scheduler
    test_stable_diffusion_long_prompt                   TestBatches.test_a_long_prompt_is_truncated_as_stock_does_...
    test_stable_diffusion_height_width_opt,
    test_inference_non_square_images                    TestBatches.test_any_size_is_guided_on_its_own_grid
    test_stable_diffusion_prompt_embeds                 TestTextSelfAttention.test_embeddings_alone_are_refused_...
    test_stable_diffusion_negative_prompt               TestGuidance.test_the_negative_prompt_does_not_change_...
    test_raises_warning_for_mask_feature                test_pipeline_pixart.py: TestOff.test_mask_feature_is_...
    test_save_load_local                                test_loading.py: test_a_saved_pipeline_loads_...
    test_from_pipe_consistent_config, _forward_pass     test_loading.py: test_from_pipe_...; test_compatibility.py:
                                                        TestFromPipe
    test_attention_slicing_forward_pass, test_freeu_enabled, test_freeu_disabled, test_fused_qkv_projections,
    test_vae_slicing, test_vae_tiling, test_ip_adapter, test_model_cpu_offload_forward_pass,
    test_sequential_cpu_offload_forward_pass, test_group_offloading_inference, test_pipeline_level_group_offloading_*,
    test_from_pipe_consistent_forward_pass_cpu_offload, test_layerwise_casting_inference, test_stable_diffusion_compile,
    test_save_load_no_safety_checker, the LoRA and textual inversion testers     test_compatibility.py

Not made: test_save_load_dduf (diffusers loads none any more); test_xformers_attention_forwardGenerator_pass and
test_pt_np_pil_inputs_equivalent, which nothing here could change.
"""

import numpy as np
import pytest
import torch

from kinds import KINDS, PROMPT, SHORT, denoiser_of, embeddings, make, run


STEPS = {"num_inference_steps": 2, "refinement_iterations": 1, "height": 32, "width": 32}
INPUTS = "callback_on_step_end_tensor_inputs"
MODELS = ("unet", "transformer", "text_encoder", "vae")


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def own(kind):
    """A pipeline of its own components, for what changes them."""
    return make(kind.tsam, kind.build())


def draw(pipe, prompt=PROMPT, **options):
    return run(pipe, prompt, **{**STEPS, **options})


def loaded(kind, path, **options):
    pipe = kind.tsam.from_pretrained(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def models_of(pipe):
    return [component for name, component in pipe.components.items() if name in MODELS]


def saved(kind, pipe, path, **options):
    """The pipeline, saved and loaded again."""
    pipe.save_pretrained(path)
    return loaded(kind, path, **options)


def without(kind, names):
    return make(kind.tsam, {**kind.components, **dict.fromkeys(names)})


@torch.no_grad()  # T5 rounds otherwise where it records gradients
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


def test_to_dtype(own):
    assert {model.dtype for model in models_of(own)} == {torch.float32} and own.dtype == torch.float32
    own.to(dtype=torch.float16)
    assert {model.dtype for model in models_of(own)} == {torch.float16} and own.dtype == torch.float16


def test_save_load_float16(kind, pipe, tmp_path):
    half = saved(kind, pipe, tmp_path / "single", dtype=torch.float16)
    again = saved(kind, half, tmp_path / "half", dtype=torch.float16)
    assert [model.dtype for model in models_of(again)] == [torch.float16] * 3
    output, expected = draw(again), draw(half)
    assert torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)


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


def test_loading_with_variants(kind, pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert list(tmp_path.glob(f"{kind.denoiser}/*.fp16.safetensors"))
    assert not list(tmp_path.glob(f"{kind.denoiser}/diffusion_pytorch_model.safetensors"))
    assert torch.equal(draw(loaded(kind, tmp_path, variant="fp16")).images, draw(pipe).images)


def test_loading_with_incorrect_variants_raises_error(kind, pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="variant=bf16"):
        loaded(kind, tmp_path, variant="bf16")


def test_cfg(pipe):
    with_guidance = draw(pipe, guidance_scale=4.0)
    assert pipe.do_classifier_free_guidance and pipe.guidance_scale == 4.0
    without = draw(pipe, guidance_scale=1.0)
    assert not pipe.do_classifier_free_guidance
    assert with_guidance.images.shape == without.images.shape
    assert not torch.equal(with_guidance.images, without.images)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_callback_inputs(pipe, all_of_them):
    names = pipe._callback_tensor_inputs if all_of_them else ["latents"]

    def clear_at_the_end(one, step, t, tensors):
        assert one is pipe and list(tensors) == names and all(map(torch.is_tensor, tensors.values()))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == one.num_timesteps - 1 else tensors

    output = draw(pipe, callback_on_step_end=clear_at_the_end, **{INPUTS: names})
    assert not output.images.any() and output.losses.shape == (1, 2)


def test_callback_cfg(pipe):
    scales = []

    def increase(one, step, t, tensors):
        scales.append(one.guidance_scale)
        one._guidance_scale += 1.0
        return tensors

    steady = draw(pipe, guidance_scale=3.0).images
    assert not torch.equal(draw(pipe, guidance_scale=3.0, callback_on_step_end=increase).images, steady)
    assert scales == [3.0, 4.0] and pipe.guidance_scale == 3.0 + pipe.num_timesteps


def test_pt_np_pil_outputs_equivalent(pipe):
    pt, array, pil = (draw(pipe, output_type=output_type).images for output_type in ("pt", "np", "pil"))
    assert pt.shape == (1, 3, 32, 32) and (pt.permute(0, 2, 3, 1).numpy() == array).all()
    assert (np.asarray(pil[0]) == (array[0] * 255).round()).all()


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
