"""Reading and moving, on tiny networks, against a slow, literal reading of the equations: `oracle.py`, which shares no
code with the product."""

import pytest
import torch
import torch.nn.functional as F
from test_contrast import positions
from torch.utils._pytree import tree_map_only

import oracle
from diffusers_tsam import attention_processors as processors
from diffusers_tsam.attention_processors import record_cross_attention, record_self_attention
from kinds import KINDS, OF_T, aligned, alignment_of, conditions_of, denoiser_of, kind_of, make
from tiny import tiny_pixart_components


PROMPTS = ("a black car", "a red cube and a blue sphere on the table", "dog on a green table")
GAMMA = 3.0
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def tokenize(pipe, prompts=PROMPTS, length=120):
    """What the text encoder is given. Only T5 is told what is padding, and cut where it is wanted."""
    if kind_of(pipe).name == "sd":
        return {"input_ids": pipe.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids}
    cut = {"padding": "max_length", "max_length": length, "truncation": True}
    return dict(pipe.tokenizer(list(prompts), return_tensors="pt", **cut))


@torch.no_grad()
def self_attention(pipe, input_ids, attention_mask=None):
    """The oracle's T' of every prompt, (B, N, N)."""
    if attention_mask is None:
        return torch.stack([oracle.clip_self_attention(pipe.text_encoder, ids) for ids in input_ids])
    both_ways = [oracle.t5_self_attention(pipe.text_encoder, *each).tolist() for each in zip(input_ids, attention_mask)]
    return torch.tensor([oracle.symmetrized(matrix) for matrix in both_ways], dtype=torch.float64)


def test_special_tokens_written_in_the_prompt_are_not_content_and_an_end_ends_it(pipe):
    begin, end = pipe.tokenizer.bos_token or "", pipe.tokenizer.eos_token
    text = pipe.get_text_self_attention([f"a {begin} black car", f"a dog {end} and a cube", ""])
    assert text.tokens == [["a", "black", "car"], ["a", "dog"], []]
    assert [positions(mask) for mask in text.content] == ([[1, 3, 4], [1, 2], []] if begin else [[0, 1, 2], [0, 1], []])


@pytest.fixture(params=["sdpa", "eager"])
def implementation(pipe, request):
    """Both of transformers' ways to compute attention that torch can see."""
    found = pipe.text_encoder.config._attn_implementation
    pipe.text_encoder.set_attn_implementation(request.param)
    yield request.param
    pipe.text_encoder.set_attn_implementation(found)


@torch.no_grad()
def test_text_self_attention_is_the_mean_of_all_layers_and_heads_and_the_encoder_is_not_touched(pipe, implementation):
    encoder, inputs = pipe.text_encoder, tokenize(pipe)
    plain = encoder(*inputs.values())[0]
    with record_self_attention(encoder) as recordings:
        recorded = encoder(*inputs.values())[0]
        encoder(*tokenize(pipe, ["a white clock"]).values())  # as a negative prompt, after the prompts
    assert torch.equal(recorded, plain) and not encoder._forward_pre_hooks and not encoder._forward_hooks
    expected = self_attention(pipe, **inputs)
    for text in (pipe.read_text_self_attention(recordings), pipe.get_text_self_attention(list(PROMPTS))):
        assert text.attention.dtype == torch.float32
        torch.testing.assert_close(text.attention.double(), expected, **CLOSE)
    if pipe.tokenizer.bos_token:
        torch.testing.assert_close(text.attention.sum(-1), torch.ones(3, 77))  # rows are distributions
    wrong = pytest.raises((ValueError, IndexError), match="[Ss]equence length|out of range")
    with wrong, record_self_attention(encoder):
        encoder(torch.full((1, 500), 10**6))  # longer than CLIP reads, and of no token that T5 has
    assert not encoder._forward_pre_hooks and not encoder._forward_hooks


@torch.no_grad()
def test_t5_is_read_right_over_every_distance_and_where_a_prompt_is_cut():
    """The long prompt has no padding and distances beyond those that T5 tells apart."""
    pipe = make(KINDS["pixart"].tsam, KINDS["pixart"].components)
    prompts = ["a black car and a white clock " * 30, "dog on the table"]
    product, inputs = pipe.get_text_self_attention(prompts, max_sequence_length=160), tokenize(pipe, prompts, 160)
    assert product.content.sum(-1).tolist() == [159, 4]
    assert inputs["attention_mask"].sum(-1).tolist() == product.lengths.tolist() == [160, 5]
    expected = self_attention(pipe, **inputs)
    torch.testing.assert_close(product.attention.double(), expected, **CLOSE)
    alone = pipe.get_text_self_attention(prompts[0], max_sequence_length=160)
    torch.testing.assert_close(alone.attention[0].double(), expected[0], **CLOSE)


def test_a_text_encoder_whose_attention_cannot_be_seen_is_refused(pipe):
    with record_self_attention(pipe.text_encoder) as recordings:
        pass
    with pytest.raises(RuntimeError, match="0 of the 2 layers"):
        pipe.read_text_self_attention(recordings)


@torch.no_grad()
def test_two_encoders_are_recorded_apart_and_each_until_its_own_forward_ends():
    pipes = [make(KINDS["sd"].tsam, KINDS["sd"].build()) for _ in range(2)]
    for parameter in pipes[1].text_encoder.parameters():
        parameter.mul_(0.9)
    inputs = [tokenize(pipe, prompts) for pipe, prompts in zip(pipes, (PROMPTS, PROMPTS[::-1]))]
    with record_self_attention(*(pipe.text_encoder for pipe in pipes)) as recordings:
        for pipe, given in zip(pipes, inputs):
            pipe.text_encoder(*given.values())
            F.scaled_dot_product_attention(*torch.randn(3, 3, 4, 77, 4))  # nobody's
            torch.randn(3, 4, 77, 77).softmax(-1)
        pipes[0].text_encoder(*inputs[1].values())
    alone = [self_attention(pipe, **given) for pipe, given in zip(pipes, inputs)]
    for recording, given, expected in zip(recordings, inputs, alone):
        assert recording.layers == 2 and torch.equal(recording.input_ids, given["input_ids"])
        torch.testing.assert_close(processors.mean_self_attention([recording]).double(), expected, **CLOSE)
    torch.testing.assert_close(processors.mean_self_attention(recordings).double(), sum(alone) / 2, **CLOSE)


def test_the_maps_grid_follows_from_their_number_of_positions():
    """At every width of latents, and after every number of halvings, rounded up as strided convolutions do."""
    for height in range(1, 140, 3):
        for width in range(1, 140):
            grid = height, width
            for _ in range(4):
                maps = {0: torch.empty(1, 1, 1).expand(1, grid[0] * grid[1], 1)}
                assert processors.mean_maps(maps, height, width).shape[-2:] == grid and not maps
                grid = tuple((side + 1) // 2 for side in grid)


@torch.no_grad()
def test_recorded_maps_are_the_softmax_of_what_each_layer_was_given(scene):
    model, layers, tokens, given = scene.model, scene.layers, 11, scene.given()
    before, plain = [layer.processor for layer in layers], model(scene.latents, **given).sample
    with oracle.captured_inputs(model) as inputs, record_cross_attention(layers, tokens) as maps:
        assert torch.equal(model(scene.latents, **given).sample, plain)
    assert [layer.processor for layer in layers] == before
    modules, each = dict(oracle.double(model).named_modules()), list(maps.values())
    mean = processors.mean_maps(maps, *scene.latents.shape[-2:])
    assert len(scene.names) == len(layers) == len(each) and mean.shape == (len(PROMPTS), tokens, *scene.grid)
    for image in range(len(PROMPTS)):
        mask = given["encoder_attention_mask"][image] if "encoder_attention_mask" in given else None
        own = {name: [tensor[image : image + 1].double() for tensor in inputs[name]] for name in scene.names}
        found = {(name,): layer[image] for name, layer in zip(scene.names, each)}
        found[tuple(scene.names)] = mean[image].flatten(1).mT
        for names, product in found.items():
            expected = oracle.mean_cross_attention({name: modules[name] for name in names}, own, mask)[:, :tokens]
            torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-7)


class Scaling:
    """A scheduler that scales the model's input."""

    def __init__(self, scale):
        self.scale = scale

    def scale_model_input(self, sample, t):
        return self.scale * sample


class Scene:
    """Three prompts of different lengths, and latents. where: what is read, as `cross_attention_layers` is told. sizes
    (B, 2): told to a transformer that is conditioned on them."""

    t = 500
    LAYERS = {"sd": oracle.layers_at, "pixart": lambda model, blocks: oracle.layers_of_blocks(*blocks)}
    SIZES = {"sd": ((7, 6), (4, 3), 16), "pixart": ((8, 12), (4, 6), (1, 2))}  # latents, maps, what is read

    def __init__(self, pipe, prompts=PROMPTS, where=None, sizes=None):
        self.pipe, self.kind, self.model = pipe, kind_of(pipe), denoiser_of(pipe)
        size, self.grid, default = self.SIZES[self.kind.name]
        self.inputs, self.text = tokenize(pipe, prompts), pipe.get_text_self_attention(list(prompts))
        self.latents, self.conditions = torch.randn(len(prompts), 4, *size), conditions_of(pipe, list(prompts))
        if sizes is not None:
            sizes = torch.cat([sizes + 1, sizes])  # the unconditional half has other ones
            ratios = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
            self.conditions["added_cond_kwargs"] = ratios
        where = where or default
        self.layers, self.names = pipe.cross_attention_layers(where), self.LAYERS[self.kind.name](self.model, where)
        self.layout, self.weight, self.phrases = None, 0.0, [()] * len(prompts)

    def given(self, images=slice(None), dtype=torch.float32):
        """What the model is called with beside the latents, the conditional half."""
        given = tree_map_only(torch.Tensor, lambda both: both.chunk(2)[1][images].to(dtype), self.conditions)
        return {"timestep": torch.full((len(given["encoder_hidden_states"]),), self.t), **given}

    def update(self, objective, scale, alpha):
        """The product's update: the latents, and the losses before."""
        regions = {"layout": self.layout, "region_weight": self.weight}
        alignment = alignment_of(self.text, alpha, GAMMA, objective, **regions)
        self.pipe.scheduler = Scaling(scale)
        moved = aligned(self.pipe, alignment, self.latents, self.t, self.conditions, self.layers)
        return moved, alignment.losses_per_image()

    def where(self, image, objective):
        """What the oracle has to know beside the latents."""
        images = slice(image, image + 1)
        inputs = {name: value[images] for name, value in self.inputs.items()}
        tokenizer = self.pipe.tokenizer
        own = oracle.content(inputs["input_ids"][0].tolist(), tokenizer.bos_token_id, tokenizer.eos_token_id)
        text = oracle.text_attention(self_attention(self.pipe, **inputs)[0].tolist(), own, GAMMA)
        compared = None if objective == "layout" else objective, self.phrases[image], self.weight
        return self.given(images, torch.float64), self.names, [(own, text)], self.grid, *compared


@pytest.fixture
def scene(pipe):
    return Scene(pipe)


def distance(value, expected):
    """Of two tensors, as a part of what is expected."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def check_update(scene, objective="l1", scale=1.0, close=1e-5):
    """The product's update against the oracle's of each image."""
    alpha, model = scene.kind.alpha * scale, oracle.double(scene.model)
    moved, losses = scene.update(objective, scale, alpha)
    for product, own, latents, image in zip(moved, losses, scene.latents, range(len(moved))):
        if objective == "layout" and not scene.phrases[image]:
            assert torch.equal(product, latents) and own[0] == 0
            continue
        expected, loss = oracle.update(model, latents.double(), scale, alpha, *scene.where(image, objective))
        assert distance(product, expected) < 1e-5
        assert distance(product - latents, expected - latents) < close
        assert own[0].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("objective, scale", [("l1", 1.0), ("l1", 0.07), ("cosine", 0.07), ("attainable", 1.0)])
def test_update_is_a_step_down_the_gradient_at_the_models_input(scene, objective, scale):
    check_update(scene, objective, scale)


@pytest.mark.parametrize("blocks", [(0, 2), (3, 3)])
@pytest.mark.parametrize("kind", [KINDS["pixart"]], ids=["pixart"])
def test_update_reads_the_blocks_that_it_is_told_to(pipe, blocks):
    check_update(Scene(pipe, where=blocks))


def test_update_tells_the_transformer_the_pictures_size():
    """As the 1024-pixel PixArt-α is told it, here another for every image."""
    pipe = make(KINDS["pixart"].tsam, tiny_pixart_components(sample_size=128, blocks=4))
    assert pipe.transformer.use_additional_conditions
    check_update(Scene(pipe, sizes=torch.tensor([[64.0, 96.0], [512.0, 512.0], [1024.0, 768.0]])))


@pytest.mark.parametrize("objective", OF_T)
def test_gradient_of_the_oracle_is_the_slope_of_its_loss(scene, objective):
    model, latents, where = oracle.double(scene.model), scene.latents[1].double(), scene.where(1, objective)
    gradient = latents - oracle.update(model, latents, 1.0, 1.0, *where)[0]
    for direction in torch.randn(2, *latents.shape, dtype=torch.float64):
        with torch.no_grad():
            ahead, behind = (oracle.loss_at(model, latents + h * direction, *where) for h in (1e-6, -1e-6))
        slope = (ahead - behind).item() / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
