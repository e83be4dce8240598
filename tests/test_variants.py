"""What is a variant's own; test_pipelines.py has the laws that every pipeline keeps."""

import runpy
from pathlib import Path

import diffusers
import pytest
import torch

from diffusers_tsam import LatentAlignment
from diffusers_tsam.attention_processors import mean_maps, record_cross_attention
from kinds import FURTHER, IMAGE, KINDS, MASK, PROMPT, calls_of, make, refused, run, use
from tiny import tiny_components


SD = KINDS["sd"]
IMG2IMG, INPAINT, CONTROLNET, SDXL, SIGMA, _ = FURTHER.values()
single_file = runpy.run_path(str(Path(__file__).parent.parent / "hub" / "single_file.py"))["single_file"]
every = pytest.mark.parametrize("kind", FURTHER.values(), ids=FURTHER)


@pytest.mark.parametrize("kind", ["sd_img2img", "sd_inpaint"], indirect=True)
@pytest.mark.parametrize("scheduler", [diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler])
def test_steps_are_counted_among_those_that_strength_leaves(stock, pipe, scheduler):
    use(scheduler, stock, pipe)
    options = {"num_inference_steps": 10, "strength": 0.6, "refinement_steps": ()}
    assert torch.equal(run(stock, **options).images, run(pipe, **options, tsam_steps=0).images)
    output = run(pipe, **options)  # of 6 steps half are guided
    assert output.losses.shape == (1, 3)
    assert output.steps == [0, scheduler.order, 2 * scheduler.order]
    with refused(pipe, ValueError, "`tsam_steps` is 7, but there are only 6 denoising steps"):
        run(pipe, **options, tsam_steps=7)


def test_a_strength_that_leaves_no_step_does_what_it_does_in_stock():
    stock, pipe = make(IMG2IMG.stock, IMG2IMG.components), make(IMG2IMG.tsam, IMG2IMG.components)
    assert torch.equal(run(stock, strength=0.1).images, run(pipe, strength=0.1).images)


def test_inpainting_by_four_channels_keeps_what_the_mask_keeps():
    components = tiny_components()
    stock, pipe = make(INPAINT.stock, components), make(INPAINT.tsam, components)
    options = {"image": IMAGE, "mask_image": MASK, "masked_image_latents": None}
    assert torch.equal(run(stock, **options).images, run(pipe, **options, tsam_steps=0).images)
    drawn, guided = run(stock, **options).images, run(pipe, **options).images
    assert torch.equal(drawn[..., 8:], guided[..., 8:]) and not torch.allclose(drawn, guided, atol=0.01)


def test_the_guided_pass_of_nine_channels_sees_mask_and_picture():
    pipe = make(INPAINT.tsam, INPAINT.components)
    with calls_of(pipe.unet) as calls:
        run(pipe, refinement_steps=(), tsam_steps=1, num_inference_steps=2)
    guided, prediction = (args[0] for args, _ in calls[:2])
    assert guided.shape[:2] == (1, 9) and torch.equal(guided[:, 4:], prediction[1:, 4:])
    assert not torch.equal(guided[:, :4], prediction[1:, :4])


@pytest.mark.parametrize("options", [{}, {"guess_mode": True}, {"guidance_scale": 1.0}], ids=str)
def test_controlnets_residuals_are_of_the_latents_that_are_predicted_from(options):
    """Against a guided step written out, with residuals that are computed anew for every model input."""
    pipe = make(CONTROLNET.tsam, CONTROLNET.components)
    call = {"num_inference_steps": 2, "tsam_steps": 1, "refinement_steps": (0,), "refinement_iterations": 2}
    with calls_of(pipe.unet) as predicted:
        output = run(pipe, alpha=20.0, **call, **options)
    assert output.losses[0, 2] < output.losses[0, 0] and len(predicted) == 3 + 1 + 1

    t, image = pipe.scheduler.timesteps[0], IMAGE.to(torch.float32)
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]

    def controlled(sample, embeds):
        images, given = image.expand(len(sample), -1, -1, -1), {"guess_mode": "guess_mode" in options}
        down, middle = pipe.controlnet(sample, t, embeds, images, **given, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    layers, settings = pipe.cross_attention_layers(), pipe.settings(alpha=20.0)
    alignment = LatentAlignment(pipe.get_text_self_attention(PROMPT), settings)

    def maps_at(sample):
        with record_cross_attention(layers, alignment.num_tokens) as maps:
            pipe.unet(sample, t, embeds, **controlled(sample, embeds))
        return mean_maps(maps, 16, 16)

    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = alignment.update(start, 1.0, maps_at, 3)
    torch.testing.assert_close(torch.stack(alignment.losses, 1), output.losses, rtol=1e-4, atol=1e-5)
    (sample, *_), given = predicted[3]
    torch.testing.assert_close(sample[-1:], moved, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = controlled(moved, embeds)
    for ours, theirs in zip(given["down_block_additional_residuals"], expected["down_block_additional_residuals"]):
        torch.testing.assert_close(ours[-1:], theirs, rtol=1e-3, atol=1e-4)
        assert not options.get("guess_mode") or not ours[0].any()
    first = predicted[0][1]["mid_block_additional_residual"]
    assert (first - given["mid_block_additional_residual"][-1:]).abs().max() > 1e-4  # of the latents before the move


def test_several_controlnets_guide_and_are_left_as_they_were():
    components = CONTROLNET.build()
    other = diffusers.ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(8, 8))
    components["controlnet"] = diffusers.MultiControlNetModel([components["controlnet"], other])
    stock, pipe = make(CONTROLNET.stock, components), make(CONTROLNET.tsam, components)
    options = {"image": [IMAGE, IMAGE], "controlnet_conditioning_scale": [1.0, 0.5]}
    for ours in ({"tsam_steps": 0}, {"alpha": 0.0}):  # with guided steps and without
        assert torch.equal(run(stock, **options).images, run(pipe, **options, **ours).images)
    output = run(pipe, **options, alpha=20.0)
    assert output.losses[0, 2] < output.losses[0, 0] and isinstance(pipe.controlnet, diffusers.MultiControlNetModel)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.controlnet.parameters())


def test_a_second_prompt_of_other_words_is_refused_since_sdxls_t_is_of_both():
    with pytest.raises(ValueError, match="`prompt_2` has other tokens than `prompt`"):
        run(make(SDXL.tsam, SDXL.components), prompt_2="a green dog")


def test_sdxls_size_conditions_and_an_early_end_go_with_guidance():
    stock, pipe = make(SDXL.stock, SDXL.components), make(SDXL.tsam, SDXL.components)
    options = {"original_size": (32, 48), "crops_coords_top_left": (4, 8), "negative_original_size": (8, 8)}
    options |= {"negative_target_size": (64, 64), "num_inference_steps": 10, "denoising_end": 0.4}
    assert torch.equal(run(stock, **options).images, run(pipe, **options, tsam_steps=0).images)
    output = run(pipe, **options, refinement_steps=())
    assert output.losses.shape == (1, 4)  # of the 5 that are planned
    assert not torch.equal(output.images, run(stock, **options).images)


def test_sigma_reads_300_tokens():
    pipe, prompt = make(SIGMA.tsam, SIGMA.components), " ".join(["a red car and"] * 50)
    output = run(pipe, prompt, num_inference_steps=2, output_attentions=True)
    assert len(output.attentions[0]["tokens"]) == 200


@every
def test_it_shares_what_stock_has_is_saved_as_an_ordinary_folder_and_loaded_by_its_file_alone(kind, tmp_path):
    stock = make(kind.stock, kind.components)
    pipe, two = kind.tsam.from_pipe(stock), {"num_inference_steps": 2}
    theirs = run(stock, **two).images
    pipe.set_progress_bar_config(disable=True)
    assert all(pipe.components[name] is part for name, part in stock.components.items())
    pipe.save_pretrained(tmp_path / "saved")
    optional = {"requires_safety_checker": False} if "safety_checker" in kind.components else {}
    loaded = kind.stock.from_pretrained(tmp_path / "saved", **optional)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, **two).images, theirs)
    single = tmp_path / kind.file
    single.write_text(single_file(kind.name), encoding="utf-8")
    custom = {"custom_pipeline": str(single), "trust_remote_code": True, **optional}
    alone = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", **custom)
    alone.set_progress_bar_config(disable=True)
    assert type(alone).__name__ == kind.family.pipeline and type(alone) is not kind.tsam
    arguments = {"output_type": "latent", "refinement_iterations": 2, **two, **kind.call}
    drawn, *_ = alone(PROMPT, generator=torch.Generator().manual_seed(0), return_dict=False, **arguments)
    ours = run(pipe, **two).images
    torch.testing.assert_close(drawn, ours, rtol=1e-4, atol=1e-3)
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "ours, theirs, message",
    [
        (SD, CONTROLNET, "StableDiffusionControlNetTSAMPipeline"),
        (SD, SDXL, "StableDiffusionXLTSAMPipeline"),
        (CONTROLNET, SD, "has no controlnet, which StableDiffusionControlNetTSAMPipeline needs"),
        (SDXL, SIGMA, "has no unet, which StableDiffusionXLTSAMPipeline needs|has no text_encoder_2, tok"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_wrong_pipelines_components_are_refused_by_what_serves_them(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        ours.tsam.from_pipe(make(theirs.stock, theirs.components))
