"""What a user of `StableDiffusionTSAMPipeline` alone may rely on."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_tsam.attention_processors import mean_maps, record_cross_attention
from kinds import KINDS, make, run


# The published unet/config.json of Stable Diffusion 1.5
SD15 = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SD15 |= {"attention_head_dim": 8, "layers_per_block": 2}


@pytest.fixture
def kind():
    return KINDS["sd"]


def test_off_with_guidance_rescaled_is_bit_identical_to_stock(stock, pipe):
    theirs = run(stock, guidance_rescale=0.7).images
    assert torch.equal(theirs, run(pipe, tsam_steps=0, guidance_rescale=0.7).images)
    assert not torch.equal(theirs, run(stock).images)


class TestArchitecture:
    @pytest.fixture(scope="class")
    def sd15(self):
        """Stable Diffusion 1.5's UNet, without memory or weights."""
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SD15)
        return make(KINDS["sd"].tsam, {**KINDS["sd"].components, "unet": unet})

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
