"""The product against a slow, literal reading of the equations: `oracle.py`, which shares no code with it."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)

import oracle
from diffusers_tsam import PixArtAlphaTSAMPipeline, StableDiffusionTSAMPipeline, TextSelfAttention
from diffusers_tsam.attention_processors import (
    LatentAlignment,
    alignment_loss,
    content_of,
    cosine_similarity,
    normalize_similarity,
    normalize_text_attention,
    read_text_self_attention,
    record_cross_attention,
    record_self_attention,
    smooth,
    symmetrize,
    updates_per_timestep,
)
from tiny import tiny_components, tiny_pixart_components


OBJECTIVES = ("l1", "l1_full", "cosine")
LENGTHS = (1, 4, 7)  # content tokens of the images in a batch
TOKENS = 9  # <bos>, up to 7 of the prompt's own, <eos> to the end
PROMPTS = ("a black car", "a red cube and a blue sphere on the table", "dog on a green table")
GRID = (4, 3)


@pytest.fixture(scope="module")
def components():
    return tiny_components()


@pytest.fixture(scope="module")
def pixart_components():
    return tiny_pixart_components()


@pytest.fixture
def pipe(components):
    return StableDiffusionTSAMPipeline(**components, requires_safety_checker=False)


@pytest.fixture
def pixart(pixart_components):
    return PixArtAlphaTSAMPipeline(**pixart_components)


@pytest.fixture(params=["pipe", "pixart"])
def either(request):
    return request.getfixturevalue(request.param)


def content_masks():
    return torch.tensor([[0 < position <= length for position in range(TOKENS)] for length in LENGTHS])


def positions(mask):
    return [position for position, own in enumerate(mask.tolist()) if own]


def causal_attention(sink=0.0):
    """T' (B, N, N), rows sum to one, the part `sink` of them going to <bos>."""
    attention = torch.rand(len(LENGTHS), TOKENS, TOKENS, dtype=torch.float64).add(0.02).tril()
    attention = (1 - sink) * attention / attention.sum(-1, keepdim=True)
    attention[..., 0] += sink
    return attention


def ragged(matrix, mask):
    """Rows of a lower triangle over the content tokens, and the sum of everything outside it."""
    own = positions(mask)
    rows = [[matrix[i, j].item() for j in own if j <= i] for i in own]
    return rows, matrix.abs().sum().item() - sum(abs(value) for row in rows for value in row)


def close(rows, expected, rel=1e-5):
    return len(rows) == len(expected) and all(
        row == pytest.approx(other, rel=rel, abs=1e-7) for row, other in zip(rows, expected)
    )


# ----------------------------------------------------------------------------------------------------------------------
# The equations


def test_symmetrized_attention_is_the_lower_triangle_of_both_directions():
    attention = torch.rand(2, 5, 5, dtype=torch.float64)
    for product, image in zip(symmetrize(attention.float()), attention.tolist()):
        assert close(product.tolist(), oracle.symmetrized(image))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 4.0])
def test_text_attention_is_that_of_each_prompt_alone(gamma):
    attention, content = causal_attention(), content_masks()
    product = normalize_text_attention(attention.float(), content, gamma)
    for image, mask in enumerate(content):
        rows, outside = ragged(product[image], mask)
        assert close(rows, oracle.text_attention(attention[image].tolist(), positions(mask), gamma))
        assert outside == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("sink", [0.0, 0.99999])
def test_text_attention_stays_right_under_a_huge_exponent(sink):
    attention, content = causal_attention(sink), content_masks()
    product = normalize_text_attention(attention.float(), content, 60.0)
    assert product.isfinite().all()
    for image, mask in enumerate(content):
        expected = oracle.text_attention_in_logs(attention[image].tolist(), positions(mask), 60.0)
        assert close(ragged(product[image], mask)[0], expected, rel=2e-5)  # 60 roundings of the base


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (2, 2), (4, 7), (16, 12)])
def test_smoothing_reflects_at_every_border(grid):
    maps = torch.rand(2, 3, *grid, dtype=torch.float64)
    product = smooth(maps.float())
    for image in range(2):
        for token in range(3):
            assert close(product[image, token].tolist(), oracle.smooth(maps[image, token].tolist()))


@pytest.mark.parametrize("grid", [(1, 5), (5, 1), (1, 1)])
def test_smoothing_a_single_row_or_column_leaves_a_flat_map_flat(grid):
    assert smooth(torch.rand(2, 3, *grid)).isfinite().all()
    torch.testing.assert_close(smooth(torch.full((2, 3, *grid), 0.3)), torch.full((2, 3, *grid), 0.3))


@pytest.mark.parametrize("objective", ["l1", "l1_full"])
def test_similarity_is_summed_over_the_tokens_that_the_objective_names(objective):
    maps, content = torch.rand(len(LENGTHS), TOKENS, *GRID, dtype=torch.float64), content_masks()
    similarity = cosine_similarity(smooth(maps.float()).flatten(2))
    product = normalize_similarity(similarity, content, objective)
    for image, mask in enumerate(content):
        own = positions(mask)
        expected = oracle.similarity(maps[image, own].tolist())
        assert close(similarity[image][own][:, own].tolist(), expected)
        rows, outside = ragged(product[image], mask)
        assert close(rows, oracle.normalized(expected, objective))
        assert outside == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 4.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_that_of_each_image_alone(objective, gamma):
    maps, content = torch.rand(len(LENGTHS), TOKENS, *GRID, dtype=torch.float64), content_masks()
    attention = causal_attention()
    product, _ = alignment_loss(
        maps.float(), normalize_text_attention(attention.float(), content, gamma), content, objective
    )
    for image, mask in enumerate(content):
        own = positions(mask)
        text = oracle.text_attention(attention[image].tolist(), own, gamma)
        expected = oracle.loss(text, maps[image, own].tolist(), objective)
        assert product[image].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("strongest", [1.0, 1e-2, 1e-4])
def test_cosine_loss_depends_on_no_scale_of_the_text_attention_beside_the_diagonal(strongest):
    """Tokens that attend to themselves far more than to others: γ = 3 leaves little beside the diagonal."""
    maps, content = torch.rand(1, TOKENS, *GRID, dtype=torch.float64), content_masks()[-1:]
    attention = causal_attention()[-1:]
    attention = attention.tril(-1) * strongest + torch.eye(TOKENS, dtype=torch.float64)
    product, _ = alignment_loss(
        maps.float(), normalize_text_attention(attention.float(), content, 3.0), content, "cosine"
    )
    own = positions(content[0])
    expected = oracle.loss(oracle.text_attention(attention[0].tolist(), own, 3.0), maps[0, own].tolist(), "cosine")
    assert product.item() == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    "ids, own",
    [
        ([0, 5, 6, 7, 1, 1, 1], [1, 2, 3]),
        ([0, 5, 1, 6, 1, 1, 1], [1]),  # a literal <eos> ends the prompt
        ([0, 5, 0, 6, 1, 1, 1], [1, 3]),  # a literal <bos> is nobody's own
        ([0, 5, 0, 6, 1, 0, 7], [1, 3]),
        ([0, 5, 6, 7, 8, 9, 1], [1, 2, 3, 4, 5]),
        ([0, 1, 1, 1, 1, 1, 1], []),
    ],
)
def test_content_ends_at_the_first_eos_and_leaves_bos_out(ids, own):
    assert oracle.content(ids, 0, 1) == own
    assert positions(content_of(torch.tensor([ids]), 0, 1)[0]) == own


def test_content_without_a_bos_starts_at_the_first_token():
    ids = [5, 6, 7, 1, 0, 0]
    assert positions(content_of(torch.tensor([ids]), None, 1)[0]) == oracle.content(ids, None, 1) == [0, 1, 2]


def test_special_tokens_written_in_the_prompt_are_not_content(pipe):
    text = pipe.get_text_self_attention(["a <|startoftext|> black car", "a dog <|endoftext|> and a cube"])
    assert text.tokens == [["a", "black", "car"], ["a", "dog"]]
    assert [positions(mask) for mask in text.content] == [[1, 3, 4], [1, 2]]


def test_a_special_token_written_in_the_prompt_ends_it_for_t5(pixart):
    text = pixart.get_text_self_attention(["a black car", "a dog </s> and a cube"], clean_caption=False)
    assert text.tokens == [["a", "black", "car"], ["a", "dog"]]
    assert [positions(mask) for mask in text.content] == [[0, 1, 2], [0, 1]]


def tokenize(pipe, prompts=PROMPTS, length=120):
    """What the text encoder is given. Only T5 is told what is padding, and cut where it is wanted."""
    if isinstance(pipe, StableDiffusionTSAMPipeline):
        return {"input_ids": pipe.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids}
    return dict(
        pipe.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    )


def self_attention(pipe, input_ids, attention_mask=None):
    """The oracle's T' of every prompt, (B, N, N)."""
    found = []
    for image, ids in enumerate(input_ids):
        if attention_mask is None:
            found.append(oracle.clip_self_attention(pipe.text_encoder, ids))
        else:
            both_ways = oracle.t5_self_attention(pipe.text_encoder, ids, attention_mask[image])
            found.append(torch.tensor(oracle.symmetrized(both_ways.tolist()), dtype=torch.float64))
    return torch.stack(found)


@pytest.fixture(params=["sdpa", "eager"])
def implementation(either, request):
    """Both of transformers' ways to compute attention that torch can see."""
    found = either.text_encoder.config._attn_implementation
    either.text_encoder.set_attn_implementation(request.param)
    yield request.param
    either.text_encoder.set_attn_implementation(found)


@torch.no_grad()
def test_text_self_attention_is_the_mean_of_all_layers_and_heads(either, implementation):
    product = either.get_text_self_attention(list(PROMPTS)).attention
    assert product.dtype == torch.float32
    expected = self_attention(either, **tokenize(either))
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_t5_is_read_right_over_every_distance_and_where_a_prompt_is_cut(pixart):
    """The long prompt has no padding and distances beyond those that T5 tells apart."""
    prompts = ["a black car and a white clock " * 30, "dog on the table"]
    product = pixart.get_text_self_attention(prompts, max_sequence_length=160)
    inputs = tokenize(pixart, prompts, 160)
    assert product.content.sum(-1).tolist() == [159, 4]
    assert inputs["attention_mask"].sum(-1).tolist() == [160, 5]
    expected = self_attention(pixart, **inputs)
    torch.testing.assert_close(product.attention.double(), expected, rtol=1e-4, atol=1e-6)
    alone = pixart.get_text_self_attention(prompts[0], max_sequence_length=160)
    torch.testing.assert_close(alone.attention[0].double(), expected[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_text_self_attention_is_read_without_touching_the_text_encoder(either, implementation):
    encoder, inputs = either.text_encoder, tokenize(either)
    plain = encoder(**inputs)[0]
    with record_self_attention(encoder) as recording:
        recorded = encoder(**inputs)[0]
        encoder(**tokenize(either, ["a white clock"]))  # as a negative prompt, after the prompts
    assert torch.equal(recorded, plain)
    assert not encoder._forward_pre_hooks
    if isinstance(either, PixArtAlphaTSAMPipeline):
        text = either.read_text_self_attention(recording)
    else:
        text = read_text_self_attention(recording, encoder, either.tokenizer)
    torch.testing.assert_close(text.attention.double(), self_attention(either, **inputs), rtol=1e-4, atol=1e-6)
    refused = pytest.raises((ValueError, IndexError), match="[Ss]equence length|out of range")
    with refused, record_self_attention(encoder):
        encoder(torch.full((1, 500), 10**6))  # longer than CLIP reads, and of no token that T5 has
    assert not encoder._forward_pre_hooks


def test_a_text_encoder_whose_attention_cannot_be_seen_is_refused(pipe):
    with record_self_attention(pipe.text_encoder) as recording:
        recording.begin(pipe.text_encoder, (tokenize(pipe)["input_ids"],), {})
    with pytest.raises(RuntimeError, match="0 of the 2 layers"):
        read_text_self_attention(recording, pipe.text_encoder, pipe.tokenizer)


@pytest.mark.parametrize("resolution", [8, 16])
def test_layers_are_those_with_that_many_queries_at_the_default_size(components, resolution):
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    pipe = StableDiffusionTSAMPipeline(**{**components, "unet": unet}, requires_safety_checker=False)
    layers, level = pipe.cross_attention_layers(resolution)
    names = {layer: name for name, layer in unet.named_modules()}
    assert [names[layer] for layer in layers] == oracle.layers_at(unet, resolution)
    assert 32 // 2**level == resolution


@torch.no_grad()
def test_recorded_maps_are_the_softmax_of_what_each_layer_was_given(scene):
    model, layers, tokens = scene.model, scene.layers, 11
    given, processors = scene.given(), [layer.processor for layer in layers]
    outputs, hooks = [], [layer.register_forward_hook(lambda m, a, output: outputs.append(output)) for layer in layers]
    plain = model(scene.latents, **given).sample
    with oracle.captured_inputs(model) as inputs, record_cross_attention(layers, tokens) as maps:
        recorded = model(scene.latents, **given).sample
    for hook in hooks:
        hook.remove()

    assert all(now is before for now, before in zip([layer.processor for layer in layers], processors))
    assert torch.equal(recorded, plain)
    assert len(outputs) == 2 * len(layers)
    assert all(torch.equal(a, b) for a, b in zip(outputs[: len(layers)], outputs[len(layers) :]))

    modules = dict(oracle.double(model).named_modules())
    assert len(scene.names) == len(layers)
    for image in range(len(PROMPTS)):
        mask = given["encoder_attention_mask"][image] if "encoder_attention_mask" in given else None
        own = {name: [tensor[image : image + 1].double() for tensor in inputs[name]] for name in scene.names}
        for index, name in enumerate(scene.names):
            expected = oracle.mean_cross_attention({name: modules[name]}, own, mask)[:, :tokens]
            torch.testing.assert_close(maps[index][image].double(), expected, rtol=1e-5, atol=1e-7)
        expected = oracle.mean_cross_attention({name: modules[name] for name in scene.names}, own, mask)[:, :tokens]
        mean = torch.stack(list(maps.values())).mean(0)[image]
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# Moving


class Scaling:
    """A scheduler that scales the model's input."""

    def __init__(self, scale):
        self.scale = scale

    def scale_model_input(self, sample, t):
        return self.scale * sample


class Scene:
    """Three prompts of different lengths, their embeddings and latents."""

    t = 500

    def __init__(self, pipe, prompts=PROMPTS):
        self.pipe, self.inputs = pipe, tokenize(pipe, prompts)
        self.text = pipe.get_text_self_attention(list(prompts))
        self.latents = torch.randn(len(prompts), 4, *self.size)

    def update(self, objective, scale, alpha, images=slice(None)):
        """The product's update of some of the images: their latents, and the losses before."""
        text = TextSelfAttention(self.text.attention[images], self.text.content[images], self.text.tokens[images])
        alignment = LatentAlignment(text, alpha, self.gamma, objective)
        return self.align(alignment, Scaling(scale), images), alignment.losses_per_image()

    def where(self, image, objective):
        """What the oracle has to know beside the latents."""
        images = slice(image, image + 1)
        inputs = {name: value[images] for name, value in self.inputs.items()}
        tokenizer = self.pipe.tokenizer
        own = oracle.content(inputs["input_ids"][0].tolist(), tokenizer.bos_token_id, tokenizer.eos_token_id)
        attention = self_attention(self.pipe, **inputs)[0].tolist()
        text = oracle.text_attention(attention, own, self.gamma)
        return self.given(images, torch.float64), self.names, own, text, self.grid, objective


class DiffusionScene(Scene):
    """Under Stable Diffusion."""

    size, grid = (7, 6), (4, 3)  # of the latents, of the maps
    gamma, alpha = 2.0, 20.0

    @torch.no_grad()
    def __init__(self, pipe, prompts=PROMPTS):
        super().__init__(pipe, prompts)
        self.model, self.context = pipe.unet, pipe.text_encoder(**self.inputs)[0]
        self.layers, self.names = pipe.cross_attention_layers()[0], oracle.layers_at(pipe.unet, 16)

    def given(self, images=slice(None), dtype=torch.float32):
        """What the UNet is called with beside the latents."""
        context = self.context[images].to(dtype)
        return {"timestep": torch.full((len(context),), self.t), "encoder_hidden_states": context}

    def align(self, alignment, scheduler, images):
        def predict(model_input):
            self.model(model_input, **self.given(images))

        return alignment.update(self.latents[images], scheduler, self.t, predict, self.layers, self.grid, step=0)


class PixArtScene(Scene):
    """Under PixArt-α; `blocks` are read, and `sizes` (B, 2) are told to a transformer that is conditioned on them."""

    size, grid = (8, 12), (4, 6)
    gamma, alpha = 4.0, 200.0  # so large that a move is no small part of the float32 latents

    @torch.no_grad()
    def __init__(self, pipe, prompts=PROMPTS, blocks=(10, 18), sizes=None):
        super().__init__(pipe, prompts)
        self.model = pipe.transformer
        self.context, self.mask, *self.negative = pipe.encode_prompt(list(prompts), negative_prompt="a white clock")
        self.conditions = {}
        if sizes is not None:
            self.conditions = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
        self.layers, self.names = pipe.cross_attention_layers(blocks), oracle.layers_of_blocks(*blocks)

    def given(self, images=slice(None), dtype=torch.float32):
        """What the transformer is called with beside the latents."""
        context = self.context[images].to(dtype)
        return {
            "timestep": torch.full((len(context),), self.t),
            "encoder_hidden_states": context,
            "encoder_attention_mask": self.mask[images],
            "added_cond_kwargs": {name: x[images].to(dtype) for name, x in self.conditions.items()},
        }

    def align(self, alignment, scheduler, images):
        """With the unconditional half before the other, as under classifier-free guidance."""
        embeds, mask = (torch.cat([a[images], b[images]]) for a, b in zip(self.negative, (self.context, self.mask)))
        conditions = {name: torch.cat([x[images] + 1, x[images]]) for name, x in self.conditions.items()}
        self.pipe.scheduler = scheduler
        return self.pipe.align_latents(
            alignment, self.latents[images], self.t, self.layers, 0, 1, embeds, mask, conditions
        )


SCENES = {"pipe": DiffusionScene, "pixart": PixArtScene}


@pytest.fixture(params=SCENES)
def scene_of(request):
    """A function of prompts."""
    pipe = request.getfixturevalue(request.param)
    return lambda prompts: SCENES[request.param](pipe, prompts)


@pytest.fixture
def scene(scene_of):
    return scene_of(PROMPTS)


def distance(value, expected):
    """Of two tensors, as a part of what is expected."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def check_update(scene, objective, scale=1.0):
    """The product's update of all images against the oracle's of each."""
    alpha, model = scene.alpha * scale, oracle.double(scene.model)
    moved, losses = scene.update(objective, scale, alpha)
    for image, latents in enumerate(scene.latents):
        expected, loss = oracle.update(model, latents.double(), scale, alpha, *scene.where(image, objective))
        assert distance(moved[image], expected) < 1e-5
        assert distance(moved[image] - latents, expected - latents) < 1e-5
        assert losses[image, 0].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.07])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_update_is_a_step_down_the_gradient_at_the_models_input(scene, objective, scale):
    check_update(scene, objective, scale)


@pytest.mark.parametrize("blocks", [(3, 12), (19, 19)])
def test_update_reads_the_blocks_that_it_is_told_to(pixart, blocks):
    check_update(PixArtScene(pixart, blocks=blocks), "l1")


def test_update_tells_the_transformer_the_pictures_size():
    """As the 1024-pixel PixArt-α is told it, here another for every image."""
    components = tiny_pixart_components(sample_size=128)
    assert components["transformer"].use_additional_conditions
    pipe = PixArtAlphaTSAMPipeline(**components)
    check_update(PixArtScene(pipe, sizes=torch.tensor([[64.0, 96.0], [512.0, 512.0], [1024.0, 768.0]])), "l1")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_of_the_oracle_is_the_slope_of_its_loss(scene, objective):
    model, latents, where = oracle.double(scene.model), scene.latents[1].double(), scene.where(1, objective)
    gradient = latents - oracle.update(model, latents, 1.0, 1.0, *where)[0]
    for direction in torch.randn(2, *latents.shape, dtype=torch.float64):
        with torch.no_grad():
            ahead, behind = (oracle.loss_at(model, latents + h * direction, *where) for h in (1e-6, -1e-6))
        slope = (ahead - behind).item() / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_image_moves_alike_alone_and_among_longer_and_shorter_prompts(scene, objective):
    together, losses = scene.update(objective, 1.0, scene.alpha)
    for image in range(len(PROMPTS)):
        alone, loss = scene.update(objective, 1.0, scene.alpha, slice(image, image + 1))
        assert distance(together[image] - scene.latents[image], alone[0] - scene.latents[image]) < 1e-5
        torch.testing.assert_close(losses[image], loss[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_image_with_no_words_or_one_stays_where_it_is(scene_of, objective):
    scene = scene_of(("a black car and a white clock", "", "dog"))
    moved, losses = scene.update(objective, 1.0, 100.0)
    assert not torch.equal(moved[0], scene.latents[0])
    torch.testing.assert_close(moved[1:], scene.latents[1:])
    assert losses[1:, 0].tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    "scheduler, expected",
    [
        (DDIMScheduler(), [4, 1, 4, 0, 0]),
        (HeunDiscreteScheduler(), [4, 0, 1, 0, 4, 0, 0, 0, 0]),  # the last step is evaluated once
        (PNDMScheduler(skip_prk_steps=True), [4, 0, 1, 4, 0, 0]),  # the first step is evaluated twice
    ],
)
def test_only_the_first_evaluation_of_a_step_is_guided(scheduler, expected):
    scheduler.set_timesteps(5)
    assert updates_per_timestep(scheduler, 5, 3, {0, 2}, 3) == expected


def test_the_papers_schedule_takes_85_updates_under_every_scheduler():
    for scheduler in (DDIMScheduler(), HeunDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)):
        scheduler.set_timesteps(50)
        updates = updates_per_timestep(scheduler, 50, 25, {0, 10, 20}, 20)
        assert (
            len(updates)
            == len(scheduler.timesteps)
            == {1: 50, 2: 99}[scheduler.order] + (isinstance(scheduler, PNDMScheduler))
        )
        expected = [21 if step in (0, 10, 20) else 1 for step in range(25)]
        assert [number for number in updates if number] == expected


def test_pndms_runge_kutta_steps_are_guided_at_the_first_of_their_four_evaluations():
    """10 steps are 19 timesteps: three steps of four evaluations, then seven of one."""
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(10)
    updates = updates_per_timestep(scheduler, 10, 5, {0, 2}, 3)
    assert updates == [4, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
