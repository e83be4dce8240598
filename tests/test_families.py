"""What only PixArt-α has, and where both families' published models are read."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from diffusers_tsam import TextSelfAttention
from diffusers_tsam.attention_processors import mean_maps, record_cross_attention
from kinds import KINDS, PROMPT, SHORT, aligned, alignment_of, calls_of, make, refused, run
from tiny import tiny_pixart_components


RAW = "A RED cube &amp; a <b>Blue</b> sphere"
SHORTLY = {"num_inference_steps": 2, "refinement_iterations": 1}


@pytest.fixture
def kind():
    return KINDS["pixart"]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": RAW, "height": None, "width": None, "max_sequence_length": 20},
        {"prompt": RAW, "clean_caption": True, "max_sequence_length": 5, "negative_prompt": "a dog on the table"},
        {"eta": 1.0, "guidance_scale": 1.0, "mask_feature": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.filterwarnings("ignore:`mask_feature`:FutureWarning")
def test_off_is_bit_identical_to_stock_with_every_option(stock, pipe, options):
    if "clean_caption" in options:
        pytest.importorskip("bs4"), pytest.importorskip("ftfy")
    options = SHORTLY | options
    assert torch.equal(run(stock, **options).images, run(pipe, tsam_steps=0, **options).images)


def both(kind, **config):
    """Stock's and T-SAM's pipeline of the tiny components with another transformer, of two blocks."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, **config}
    transformer = PixArtTransformer2DModel(num_layers=2, caption_channels=16, **config).eval()
    return [make(cls, {**kind.components, "transformer": transformer}) for cls in (kind.stock, kind.tsam)]


class TestOtherTransformers:
    """Off they draw what they draw in stock, to the bit."""

    def test_a_binned_picture_is_guided_on_the_grid_that_it_is_drawn_on(self, kind):
        stock, pipe = both(kind, sample_size=32)
        options = {"height": 40, "width": 80, "use_resolution_binning": True, "guidance_scale": 1.0}
        options |= {"num_inference_steps": 1, "output_type": "np"}
        theirs = run(stock, **options).images
        assert theirs.shape == (1, 40, 80, 3) and (run(pipe, tsam_steps=0, **options).images == theirs).all()
        guided = {"tsam_steps": 1, "refinement_steps": (), "attention_layers": (0, 0), "output_attentions": True}
        output = run(pipe, **options, **guided)
        assert output.attentions[0]["maps"].shape == (1, 7, 44, 88)  # of 176 x 352 pixels
        assert output.images.shape == theirs.shape

    def test_the_pictures_size_is_a_condition_of_the_guided_passes_too(self, kind):
        stock, pipe = both(kind, sample_size=128, attention_head_dim=6, cross_attention_dim=12)
        assert stock.transformer.use_additional_conditions
        options = {"prompt": [PROMPT, SHORT], "num_images_per_prompt": 2, "height": 32, "width": 48, **SHORTLY}
        assert torch.equal(run(stock, **options).images, run(pipe, tsam_steps=0, **options).images)
        with calls_of(pipe.transformer) as calls:
            output = run(pipe, attention_layers=(0, 1), **options)
        assert output.losses.isfinite().all() and output.images.isfinite().all()
        for args, kwargs in calls:
            conditions = kwargs["added_cond_kwargs"]
            assert torch.equal(conditions["resolution"], torch.tensor([[32.0, 48.0]] * len(args[0])))
            torch.testing.assert_close(conditions["aspect_ratio"], torch.full((len(args[0]), 1), 32 / 48))

    def test_a_variance_that_is_not_learned_is_guided(self, kind):
        stock, pipe = both(kind, sample_size=32, out_channels=4)
        theirs, output = run(stock, **SHORTLY).images, run(pipe, attention_layers=(0, 1), **SHORTLY)
        assert torch.equal(run(pipe, tsam_steps=0, **SHORTLY).images, theirs)
        assert output.images.isfinite().all() and not torch.equal(output.images, theirs)


def test_a_longer_padding_does_not_change_the_losses(pipe):
    options = {"prompt": [PROMPT, SHORT], "seed": 1, **SHORTLY}
    losses = [run(pipe, max_sequence_length=length, **options).losses for length in (12, 120)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


class TestTextSelfAttention:
    def test_it_is_of_the_cleaned_prompt(self, pipe):
        pytest.importorskip("bs4"), pytest.importorskip("ftfy")
        cleaned = ["a", "red", "cube", "a", "blue", "sphere"]
        assert pipe.get_text_self_attention(RAW, clean_caption=True).tokens == [cleaned]
        output = run(pipe, RAW, clean_caption=True, output_attentions=True, **SHORTLY)
        assert output.attentions[0]["tokens"] == cleaned
        assert torch.equal(output.losses, run(pipe, " ".join(cleaned), **SHORTLY).losses)

    def test_it_is_of_the_raw_prompt_in_lower_case_where_nothing_is_cleaned(self, pipe):
        (tokens,) = pipe.get_text_self_attention(RAW).tokens
        assert tokens[:3] == ["a", "red", "cube"] and "&" in tokens and "A" not in tokens
        assert run(pipe, RAW, output_attentions=True, **SHORTLY).attentions[0]["tokens"] == tokens

    def test_it_is_of_the_tokens_that_a_short_sequence_has_room_for(self, pipe):
        text = pipe.get_text_self_attention(PROMPT, max_sequence_length=5)
        assert text.tokens == [["a", "black", "car", "and"]] and text.attention.shape == (1, 5, 5)
        output = run(pipe, max_sequence_length=5, output_attentions=True, **SHORTLY)
        assert output.attentions[0]["tokens"] == text.tokens[0]
        given = run(pipe, max_sequence_length=5, text_self_attention=text, **SHORTLY)
        assert torch.equal(given.images, output.images)
        with refused(pipe, ValueError, "these prompts need"):
            run(pipe, text_self_attention=text)


def test_the_papers_nine_blocks_are_read_unless_others_are_asked_for(kind):
    pipe = make(kind.tsam, tiny_pixart_components())
    blocks = pipe.transformer.transformer_blocks
    assert pipe.layers_of(pipe.settings()) == [blocks[k].attn2 for k in range(10, 19)] == pipe.cross_attention_layers()
    assert pipe.cross_attention_layers([3, 3]) == [blocks[3].attn2]
    losses = [run(pipe, attention_layers=layers, **SHORTLY).losses[0, 0] for layers in ((10, 18), (3, 3))]
    assert losses[0] != losses[1]


def test_blocks_that_a_shallow_transformer_lacks_are_refused_and_the_remedy_works(pipe):
    with refused(pipe, ValueError, r"has 4 blocks, 0 to 3\..*, for instance \(1, 2\), or `tsam_steps=0`"):
        run(pipe, attention_layers=(10, 18), **SHORTLY)
    assert run(pipe, attention_layers=(1, 2), **SHORTLY).losses.isfinite().all()
    assert run(pipe, tsam_steps=0, **SHORTLY).losses.shape == (1, 0)


@pytest.mark.parametrize("side", [64, 128])  # of the latents of 512 and 1024 pixels
def test_pixart_xl_2_goes_through_a_guided_step(kind, side):
    with torch.device("meta"):  # without memory or weights
        transformer = PixArtTransformer2DModel(sample_size=side, caption_channels=4096)
        latents, t = torch.empty(1, 4, side, side), torch.ones(())
        sizes = {"resolution": torch.empty(2, 2), "aspect_ratio": torch.empty(2, 1)}
        conditions = {"encoder_hidden_states": torch.empty(2, 120, 4096), "encoder_attention_mask": torch.ones(2, 120)}
        conditions["added_cond_kwargs"] = sizes if side == 128 else dict.fromkeys(sizes)
    assert transformer.use_additional_conditions == (side == 128)
    pipe = make(kind.tsam, {**kind.components, "transformer": transformer})
    text = TextSelfAttention(torch.ones(1, 9, 9), torch.ones(1, 9, dtype=torch.bool), [["word"] * 9])
    alignment = alignment_of(text, 15.0, 4.0, keep_maps=True)
    on_device = {name: getattr(alignment.text, name).to("meta") for name in ("target", "attention", "content")}
    alignment.text = alignment.text._replace(**on_device)
    layers = pipe.cross_attention_layers()
    with torch.no_grad():
        moved = aligned(pipe, alignment, latents, t, conditions, layers)
    assert len(layers) == 9 and moved.shape == latents.shape
    assert alignment.maps[0].shape == (1, 9, side // 2, side // 2)


# The published unet/config.json of Stable Diffusion 1.5
SD15 = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SD15 |= {"attention_head_dim": 8, "layers_per_block": 2}


@pytest.fixture(scope="module")
def sd15():
    """Stable Diffusion 1.5's UNet, without memory or weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    return make(KINDS["sd"].tsam, {**KINDS["sd"].components, "unet": unet})


class TestStableDiffusion15:
    @pytest.mark.parametrize("height, width, grid", [(512, 512, (16, 16)), (768, 512, (24, 16)), (520, 512, (17, 16))])
    def test_sd15_records_the_same_five_layers_at_every_size(self, sd15, height, width, grid):
        layers = sd15.cross_attention_layers()
        names = {id(module): name for name, module in sd15.unet.named_modules()}
        blocks = [names[id(layer)].split(".attentions")[0] for layer in layers]
        assert blocks == ["down_blocks.2"] * 2 + ["up_blocks.1"] * 3
        latents = torch.empty(1, 4, height // 8, width // 8, device="meta")
        with record_cross_attention(layers, 9) as maps, torch.no_grad():
            sd15.unet(latents, 1, encoder_hidden_states=torch.empty(1, 77, 768, device="meta"))
        assert [tuple(m.shape) for m in maps.values()] == [(1, grid[0] * grid[1], 9)] * 5
        assert mean_maps(maps, *latents.shape[-2:]).shape == (1, 9, *grid)

    def test_another_grid_can_be_asked_for(self, sd15):
        assert [len(sd15.cross_attention_layers(side)) for side in (64, 32, 16, 8)] == [5, 5, 5, 1]
