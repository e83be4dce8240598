"""What a user of `StableDiffusionTSAMPipeline` alone may rely on."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_tsam import StableDiffusionTSAMPipeline, attention_processors
from diffusers_tsam.attention_processors import record_cross_attention
from kinds import PROMPT, SHORT, refused, run


# The published unet/config.json of Stable Diffusion 1.5
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}


def test_off_with_guidance_rescaled_is_bit_identical_to_stock(stock, pipe):
    theirs = run(stock, guidance_rescale=0.7).images
    assert torch.equal(theirs, run(pipe, tsam_steps=0, guidance_rescale=0.7).images)
    assert not torch.equal(theirs, run(stock).images)


@pytest.mark.parametrize(
    "schedule, number, expected",
    [
        ("paper", 50, (25, {0, 10, 20}, 20)),
        ("paper", 20, (10, {0, 4, 8}, 20)),
        ("paper", 4, (2, {0, 1}, 20)),
        ("paper", 1, (1, {0}, 20)),
        ("fast", 50, (10, {0, 4, 8}, 10)),
        ("fast", 25, (5, {0, 2, 4}, 5)),
        ("fast", 4, (1, {0}, 0)),
    ],
)
def test_the_schedules_scale_with_the_number_of_steps(schedule, number, expected):
    assert attention_processors.check_tsam_inputs(number, None, 10.0, 2.0, None, None, "l1", schedule) == expected


def test_a_row_of_t_is_a_distribution_over_all_tokens_up_to_its_own(pipe):
    text = pipe.get_text_self_attention([PROMPT, SHORT])
    torch.testing.assert_close(text.attention.sum(-1), torch.ones(2, 77))


def test_a_grid_that_the_unet_does_not_have_is_refused(pipe):
    with refused(pipe, ValueError, "grids of 16"):
        run(pipe, attention_resolution=8)


@pytest.fixture(scope="module")
def sd15(components):
    """Stable Diffusion 1.5's UNet, without memory or weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    return StableDiffusionTSAMPipeline(**{**components, "unet": unet}, requires_safety_checker=False)


class TestArchitecture:
    @pytest.mark.parametrize("height, width, grid", [(512, 512, (16, 16)), (768, 512, (24, 16)), (520, 512, (17, 16))])
    def test_sd15_records_the_same_five_layers_at_every_size(self, sd15, height, width, grid):
        layers, level = sd15.cross_attention_layers()
        names = {id(module): name for name, module in sd15.unet.named_modules()}
        assert [names[id(layer)].split(".attentions")[0] for layer in layers] == [
            "down_blocks.2",
            "down_blocks.2",
            "up_blocks.1",
            "up_blocks.1",
            "up_blocks.1",
        ]
        latents = torch.empty(1, 4, height // 8, width // 8, device="meta")
        assert tuple(-(-side // 2**level) for side in latents.shape[-2:]) == grid
        with record_cross_attention(layers, 9) as maps, torch.no_grad():
            sd15.unet(latents, 1, encoder_hidden_states=torch.empty(1, 77, 768, device="meta"))
        assert [tuple(m.shape) for m in maps.values()] == [(1, grid[0] * grid[1], 9)] * 5

    def test_another_grid_can_be_asked_for(self, sd15):
        assert [len(sd15.cross_attention_layers(side)[0]) for side in (64, 32, 16, 8)] == [5, 5, 5, 1]
