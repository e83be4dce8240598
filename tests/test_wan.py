"""What is Wan's own: videos, a loop that scales no latents, its attention. test_pipelines.py has the common laws."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from transformers import UMT5EncoderModel

from attached import Seen, attention_maps
from diffusers_tsam import tsam
from diffusers_tsam.attention_processors import mean_maps, record_cross_attention
from diffusers_tsam.tsam import LatentAlignment, TextSelfAttention
from diffusers_tsam.tsam_arguments import Settings
from diffusers_tsam.tsam_layout import layout_of
from kinds import FURTHER, PROMPT, SHORT, calls_of, make, refused, run
from tiny import tiny_wan_components


ONE = {"tsam_steps": 1, "refinement_steps": (), "num_inference_steps": 2}


@pytest.fixture
def kind():
    return FURTHER["wan"]


@torch.no_grad()
def test_the_attention_that_is_read_is_what_wan_draws_with(kind):
    """Its norms are over all heads. What the layer returns is as without reading."""
    layer = kind.build()["transformer"].blocks[0].attn2.double()
    torch.nn.init.normal_(layer.norm_k.weight, 1.0, 0.5)
    given = torch.randn(2, 24, 24).double(), torch.randn(2, 7, 24).double(), None, None
    expected = layer(*given)
    with record_cross_attention([layer], 5) as maps, Seen([layer]) as seen:
        assert torch.equal(layer(*given), expected)
    attended = attention_maps(seen.pairs, slice(None), slice(0, 7), True)
    torch.testing.assert_close(maps[0].double(), attended[..., :5], rtol=1e-4, atol=1e-6)


def test_maps_are_of_frames_in_their_order():
    positions = torch.arange(3 * 4 * 6.0)
    maps = mean_maps({0: positions[None, :, None].expand(1, -1, 2)}, 8, 12, 1, (3,))
    assert maps.shape == (1, 2, 3, 4, 6) and torch.equal(maps[0, 1].flatten(), positions)


@pytest.mark.parametrize("objective", [*tsam.OBJECTIVES, "layout"])
def test_a_still_videos_loss_is_that_of_its_frame(objective):
    """So frames are smoothed, and places taken, each by itself."""
    attention, frame = torch.rand(1, 5, 5).tril(), torch.rand(1, 5, 6, 4)
    text = TextSelfAttention(attention, torch.ones(1, 5, dtype=torch.bool), [["w0", "w1", "w2", "w3", "w4"]])
    layout = layout_of([{"w1": (0, 0, 0.5, 1)}], text, str.split)
    settings = Settings(objective=objective, regions=layout.regions, output_attentions=True)
    still, video = (LatentAlignment(text, settings, layout=layout) for _ in range(2))
    frames = frame.unsqueeze(2).expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(video.loss_of(frames), still.loss_of(frame))


def test_a_words_place_may_move_from_frame_to_frame():
    dot = torch.zeros(1, 1, 3, 5, 5)
    dot[0, 0, [0, 1, 2], [0, 2, 4], [0, 2, 4]] = 1
    assert tsam.spread_of(dot).abs().max() < 1e-6
    video = torch.rand(2, 4, 3, 5, 6)
    frames = [tsam.spread_of(frame) for frame in video.unbind(2)]
    torch.testing.assert_close(tsam.spread_of(video), torch.stack(frames).mean(0))


def test_a_blur_is_within_a_frame():
    maps = torch.zeros(1, 1, 3, 5, 5)
    maps[0, 0, 1] = torch.rand(5, 5)
    blurred = tsam.smooth(maps)
    assert not blurred[0, 0, [0, 2]].any()
    torch.testing.assert_close(blurred[:, :, 1], tsam.smooth(maps[:, :, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_predictions_and_the_step_start_from_the_moved_latents(kind, dtype, tmp_path):
    """Against stock's drawing from the latents that one update gives. Stock keeps them in float32."""
    components = kind.build()
    components["transformer"].save_pretrained(tmp_path)
    components["transformer"] = type(components["transformer"]).from_pretrained(tmp_path, torch_dtype=dtype)
    pipe, stock = make(kind.tsam, components), make(kind.stock, components)
    stepped, step = [], pipe.scheduler.step

    def watch(prediction, t, sample, *args, **kwargs):
        stepped.append(sample)
        return step(prediction, t, sample, *args, **kwargs)

    pipe.scheduler.step = watch
    with calls_of(pipe.transformer) as calls:
        output = run(pipe, relative_step=0.3, **ONE)
    guided, prompt, negative, *_ = [args[0] if args else kwargs["hidden_states"] for args, kwargs in calls]
    start = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert len(calls) == 5 and torch.equal(guided, start.to(dtype))
    assert torch.equal(prompt, negative) and prompt.dtype == dtype
    assert ((prompt - start).norm() / start.norm() - 0.3).abs() < 0.01
    moved = stepped[0]
    assert moved.dtype == torch.float32 and (moved - prompt.float()).abs().max() <= 2**-7 * moved.abs().max()
    expected = run(stock, latents=moved, num_inference_steps=2).images
    assert (output.images - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 0.02)
    assert torch.equal(run(pipe, alpha=0.0).images, run(stock).images)


def test_latents_from_a_callback_are_moved_in_the_next_step(pipe):
    replaced = torch.randn(1, 16, 3, 8, 12)

    def replace(one, step, t, tensors):
        return {"latents": replaced} if step == 0 else {}

    with calls_of(pipe.transformer) as calls:
        run(pipe, callback_on_step_end=replace, tsam_steps=2, refinement_steps=())
    given = [args[0] if args else kwargs["hidden_states"] for args, kwargs in calls]  # of a step guided, then drawn
    assert torch.equal(given[3], replaced) and not torch.equal(given[4], replaced)


def test_umt5s_t_is_the_mean_over_its_layers_made_causal(pipe):
    text = pipe.get_text_self_attention([PROMPT, SHORT])
    assert isinstance(pipe.text_encoder, UMT5EncoderModel) and text.tokens == [PROMPT.split(), SHORT.split()]
    tokens = pipe.tokenizer(SHORT, padding="max_length", max_length=226, return_tensors="pt")
    pipe.text_encoder.set_attn_implementation("eager")
    with torch.no_grad():
        layers = pipe.text_encoder(**tokens, output_attentions=True).attentions
    pipe.text_encoder.set_attn_implementation("sdpa")
    mean = torch.stack(layers).mean((0, 2))
    torch.testing.assert_close(text.attention[1:], ((mean + mean.mT) / 2).tril())


def test_embeddings_need_t_as_read_by_the_pipeline(pipe):
    with torch.no_grad():
        embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(PROMPT)))
    with refused(pipe, ValueError, "get_text_self_attention"):
        run(pipe, None, **embeds)
    text = pipe.get_text_self_attention(PROMPT)
    expected = run(pipe, max_sequence_length=226).images
    assert torch.equal(run(pipe, None, text_self_attention=text, **embeds).images, expected)


def test_blocks_at_pixarts_shares_are_read_and_others_refused(pipe):
    assert pipe.cross_attention_layers() == [block.attn2 for block in pipe.transformer.blocks[1:3]]
    with refused(pipe, ValueError, r"is \(2, 4\), but this transformer has 4 blocks, 0 to 3. .*\(1, 2\)"):
        run(pipe, attention_layers=(2, 4))


def test_a_second_transformer_is_refused_and_off_is_stock(kind):
    components = kind.build()
    components["transformer_2"] = tiny_wan_components()["transformer"]
    stock, pipe = (make(cls, components | {"boundary_ratio": 0.9}) for cls in (kind.stock, kind.tsam))
    for options in ({}, {"tsam_steps": 0, "candidates": 2}):
        with refused(pipe, ValueError, "`transformer_2`, which T-SAM does not guide"):
            run(pipe, **options)
    assert torch.equal(run(pipe, tsam_steps=0).images, run(stock).images)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize(
    "scheduler",
    [UniPCMultistepScheduler(**FLOW), DPMSolverMultistepScheduler(**FLOW), FlowMatchHeunDiscreteScheduler(shift=3.0)],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_guide_too_and_without_an_alpha_draw_stocks_video(kind, scheduler):
    stock, pipe = (make(cls, kind.components | {"scheduler": scheduler}) for cls in (kind.stock, kind.tsam))
    plain = run(stock).images
    for options in ({"tsam_steps": 0}, {"alpha": 0.0}):
        assert torch.equal(run(pipe, **options).images, plain)
    output = run(pipe, alpha=kind.alpha, refinement_iterations=10)
    assert output.losses[0, 10] < 0.97 * output.losses[0, 0] and output.images.isfinite().all()
    assert not torch.allclose(output.images, plain, atol=0.01)


WAYS = {
    "enable_gradient_checkpointing": {},
    "fuse_qkv_projections": {},
    "compile_repeated_blocks": {"backend": "eager"},
    "enable_group_offload": {"onload_device": "cpu", "offload_device": "cpu", "offload_type": "leaf_level"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_only_computes_in_another_way_guides_to_the_same(own, way):
    expected = run(own)
    getattr(own.transformer, way)(**WAYS[way])
    output = run(own)
    torch.testing.assert_close(output.losses, expected.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.images, expected.images, rtol=1e-3, atol=1e-3)
