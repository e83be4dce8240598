"""What demanding users do: other text encoders, odd components, precision contexts, objectives of their own."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusers import LCMScheduler, SASolverScheduler, UniPCMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from test_diffusers_checks import given_for, without

from diffusers_tsam import TextSelfAttention, attention_processors, tsam, tsam_pipeline
from kinds import PROMPT, SHORT, alignment_of, denoiser_of, generators, kind_of, make, refused, use
from kinds import run as run_longer


only_sd = pytest.mark.parametrize("kind", ["sd"], indirect=True)
only_pixart = pytest.mark.parametrize("kind", ["pixart"], indirect=True)


def run(pipe, prompt=PROMPT, **options):
    """A call of two steps, the first of which is guided, unless told otherwise."""
    return run_longer(pipe, prompt, **{"num_inference_steps": 2, "refinement_iterations": 1, **options})


@only_pixart
def test_t_of_other_tokens_than_the_embeddings_is_refused_and_by_default_they_are_the_same(pipe):
    pytest.importorskip("bs4"), pytest.importorskip("ftfy")
    prompt = "a black car & a white clock"
    given, cleaned = given_for(pipe, prompt), pipe.get_text_self_attention(prompt, clean_caption=True)
    text = given["text_self_attention"]
    assert text.lengths.tolist() == given["prompt_attention_mask"].sum(-1).tolist() and "&" in text.tokens[0]
    assert run(pipe, None, num_images_per_prompt=2, **given).losses.shape[0] == 2
    with refused(pipe, ValueError, r"prompts of \[7\] tokens, but by their mask the embeddings are of \[\d+\]"):
        run(pipe, None, **given | {"text_self_attention": cleaned})
    with pytest.raises(ValueError, match="`clean_caption`"):
        run(pipe, prompt, text_self_attention=cleaned, num_images_per_prompt=2)


@only_pixart
@pytest.mark.parametrize("prompt", ["a red <pad> cube", "a red </s> cube and a dog"])
def test_a_token_that_pads_or_ends_inside_the_prompt_is_no_padding(pipe, prompt):
    run(pipe, None, **given_for(pipe, prompt))


GROUPED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 50, "head_dim": 8}
GROUPED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3}
ENCODERS = {
    "Qwen3Model": (GROUPED, ["sdpa", "eager"]),
    "MistralModel": (GROUPED, ["sdpa", "eager"]),
    "Gemma2Model": (GROUPED | {"attn_logit_softcapping": 2.0}, ["eager"]),  # transformers' sdpa knows no soft cap
    "UMT5EncoderModel": (T5, ["sdpa", "eager"]),
}


@torch.no_grad()
@pytest.mark.parametrize("name, way", [(name, way) for name, (_, ways) in ENCODERS.items() for way in ways])
def test_self_attention_is_read_as_eager_attention_returns_it_also_where_query_heads_share_keys(name, way):
    cls, (config, _) = getattr(transformers, name), ENCODERS[name]
    encoder = cls(cls.config_class(**config)).eval()
    for weight, parameter in encoder.named_parameters():  # random initialisation attends evenly; spread it
        if weight.endswith(("q_proj.weight", "k_proj.weight", ".q.weight", ".k.weight")):
            parameter.mul_(8)
    ids, every_token = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask = every_token.clone()
    mask[1, 6:] = False
    for own, given in ((every_token, {}), (mask, {"attention_mask": mask.long()})):
        encoder.set_attn_implementation(way)
        with attention_processors.record_self_attention(encoder) as recordings:
            encoder(ids, **given)
        encoder.set_attn_implementation("eager")
        expected = torch.stack(encoder(ids, output_attentions=True, **given).attentions).mean((0, 2))
        assert expected[0, -1].std() > 0.02
        found = attention_processors.mean_self_attention(recordings)  # what padding attends to is nobody's
        torch.testing.assert_close(found[own], expected[own], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, SASolverScheduler], ids=lambda cls: cls.__name__)
class TestCorrectors:
    def test_an_image_that_is_not_moved_is_stocks_also_in_a_batch_with_one_that_is(self, kind, stock, pipe, scheduler):
        use(scheduler, stock, pipe)
        prompts, options = [PROMPT, "dog"], {"num_inference_steps": 4, "tsam_steps": 3}
        theirs = run(stock, prompts, generator=generators(2), **options).images
        unmoved = run(pipe, prompts, generator=generators(2), alpha=0.0, **options).images
        assert torch.equal(unmoved, theirs)
        batch = run(pipe, prompts, generator=generators(2), alpha=kind.alpha, **options).images
        torch.testing.assert_close(batch[1], theirs[1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(batch[0], theirs[0], rtol=0.05, atol=0.05)
        if scheduler is UniPCMultistepScheduler:  # the other draws noise for the batch
            alone = run(pipe, "dog", seed=1, **options).images
            torch.testing.assert_close(batch[1], alone[0], rtol=1e-4, atol=1e-4)

    def test_a_move_is_not_taken_back(self, scheduler):
        scheduler, moved = scheduler(), SimpleNamespace(moved=torch.tensor([True, False]))
        names = "multistep_uni_c_bh_update", "stochastic_adams_moulton_update"
        name = next(name for name in names if hasattr(scheduler, name))
        vars(scheduler)[name] = lambda *args, this_sample, **kwargs: torch.zeros_like(this_sample)
        kept = vars(scheduler)[name]
        with pytest.raises(KeyboardInterrupt), tsam_pipeline.uncorrected(scheduler, moved):
            corrected = getattr(scheduler, name)(None, this_sample=torch.ones(2, 4, 8, 8))
            assert (corrected[0] == 1).all() and (corrected[1] == 0).all()
            raise KeyboardInterrupt
        assert vars(scheduler)[name] is kept


def test_few_steps_get_few_updates(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert run(pipe, num_inference_steps=4, refinement_iterations=None).losses.shape[1] <= 4


def test_weights_made_in_inference_mode_are_refused_with_the_remedy(kind):
    with torch.inference_mode():
        pipe = make(kind.tsam, kind.build())
    with pytest.raises(RuntimeError, match="inference_mode.*outside of it, or pass `tsam_steps=0`"):
        run(pipe)
    assert run(pipe, tsam_steps=0).images.isfinite().all()


def test_the_equations_leave_autocast(pipe):
    seen = []

    def objective(maps, text):
        seen.append((maps, torch.is_autocast_enabled("cpu")))
        return tsam.l1(maps, text)

    with torch.autocast("cpu", torch.bfloat16):
        output = run(pipe, num_inference_steps=1, tsam_steps=1, refinement_steps=(), objective=objective)
        query, key = torch.randn(2, 1, 2, 9, 4)
        probabilities = attention_processors.attention_probabilities(query, key)
    ((maps, autocast),) = seen
    assert maps.dtype == torch.float32 and not autocast
    alignment = alignment_of(pipe.get_text_self_attention(PROMPT), 1.0, pipe.settings().gamma)
    torch.testing.assert_close(alignment.loss_of(maps).detach(), output.losses[:, 0], rtol=0.05, atol=0.05)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, (query @ key.mT / 2).softmax(-1), rtol=1e-5, atol=1e-6)


def test_a_denoiser_that_lets_no_gradient_through_says_so(own):
    denoiser = denoiser_of(own)
    handle = denoiser.register_forward_pre_hook(lambda module, args: (args[0].detach().round(decimals=2), *args[1:]))
    with pytest.raises(RuntimeError, match="Quantised activations let none through: quantise the weights alone"):
        run(own)
    handle.remove()
    assert run(own).images.isfinite().all()


@only_sd
def test_a_tokenizer_that_ends_no_prompt_is_refused(own):
    own.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="ends no prompt with <eos>.*`tsam_steps=0`"):
        own.get_text_self_attention(PROMPT)


@only_sd
def test_a_unet_without_a_size_draws_as_stock_and_says_what_guidance_lacks(kind, own):
    own.unet.register_to_config(sample_size=None)
    size = {"height": 64, "width": 64}
    assert torch.equal(run(own, tsam_steps=0, **size).images, run(make(kind.stock, own.components), **size).images)
    with refused(own, ValueError, "has no `sample_size`.*register_to_config"):
        run(own, **size)
    own.unet.register_to_config(sample_size=32)
    assert run(own, **size).losses.isfinite().all()


@only_sd
def test_a_unet_that_rounds_odd_sizes_down_is_guided(own):
    for block in own.unet.down_blocks:
        for layer in block.downsamplers or []:
            layer.conv.padding, layer.padding = (0, 0), 0
    output = run(own, latents=torch.randn(1, 4, 33, 33), height=64, width=64, output_attentions=True)
    assert output.attentions[0]["maps"].shape[-2:] == (16, 16)


def test_without_a_text_encoder_a_prompt_is_refused_and_without_a_denoiser_every_call(kind):
    pipe = without(kind, "text_encoder")
    for read in (run, lambda pipe: pipe.get_text_self_attention(PROMPT)):
        with pytest.raises(ValueError, match="no text encoder.*`prompt_embeds`"):
            read(pipe)
    with pytest.raises(ValueError, match=f"`{kind.denoiser}=None`"):
        run(without(kind, kind.denoiser))


def test_as_many_latents_as_prompts_are_asked_for(pipe):
    with pytest.raises(ValueError, match="`latents` hold 1 images, but 2 are to be aligned"):
        run(pipe, [PROMPT, SHORT], latents=torch.randn(1, 4, 32, 32))


def left(maps, text):
    """How little the words are attended to in the left half."""
    half = maps.shape[-1] // 2
    return -(maps[..., :half].sum((-1, -2)) * text.content).sum(-1)


def test_an_objective_of_ones_own_moves_a_prompt_of_one_word_alone_as_in_a_batch(own):
    options = {"objective": left, "relative_step": 0.2}
    batch, alone = run(own, ["dog", PROMPT], generator=generators(2), **options), run(own, "dog", **options)
    assert alone.losses.shape == (1, 2) and (batch.losses[:, 1] < batch.losses[:, 0]).all()
    assert not torch.equal(alone.images, run(own, "dog", tsam_steps=0).images)
    torch.testing.assert_close(batch.images[0], alone.images[0], rtol=1e-3, atol=1e-3)


@only_sd
def test_a_processor_of_ones_own_gets_its_arguments_in_guided_passes_too(own):
    seen = []

    class Strong(AttnProcessor2_0):
        def __call__(self, *args, strength=1.0, **kwargs):
            seen.append(strength)
            return super().__call__(*args, **kwargs)

    own.unet.set_attn_processor(Strong())
    run(own, cross_attention_kwargs={"strength": 0.5})
    assert set(seen) == {0.5} and len(seen) > 2 * len(own.unet.attn_processors)


def test_a_gradient_that_is_not_finite_is_said_and_its_image_stays(own, warnings_seen):
    def rooted(maps, text):
        return tsam.l1(maps, text) + (0 * maps).flatten(1).norm(dim=1).sqrt()

    output = run(own, objective=rooted)
    assert torch.equal(output.images, run(own, tsam_steps=0).images)
    assert "A gradient was not finite" in warnings_seen.text


def test_after_a_step_without_a_finite_gradient_float16_guides_again():
    text = TextSelfAttention(torch.rand(1, 3, 3).tril() + 0.1, torch.ones(1, 3, dtype=torch.bool), [["word"] * 3])
    alignment, latents = alignment_of(text, 1.0, 1.0), torch.randn(1, 3, 4, 4).half()
    factor = torch.tensor([torch.inf, 1e-3])  # of the maps of the first update, and of the second

    def maps_at(model_input):
        return (factor[len(alignment.losses)] * model_input.float()).exp()

    stayed = alignment.update(latents, 1.0, maps_at)
    assert torch.equal(stayed, latents) and not alignment.finite[-1]
    gradient, _, _ = alignment.gradient(stayed, 1.0, maps_at)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_an_objective_that_writes_into_its_maps_leaves_those_that_are_returned(pipe):
    options = {"output_attentions": True, "alpha": 0.0}
    written = run(pipe, objective=lambda maps, text: tsam.l1(maps.mul_(2), text), **options)
    assert torch.equal(written.attentions[0]["maps"], run(pipe, **options).attentions[0]["maps"])


def test_an_objective_that_draws_with_the_model_that_is_read_is_told_to_use_a_copy(pipe):
    with pytest.raises(attention_processors.LastMapRecorded, match="cannot run the denoiser.* Let it run a copy"):
        run(pipe, objective=lambda maps, text: run(pipe, tsam_steps=0))
    copied = make(kind_of(pipe).tsam, pipe.components | {pipe.denoiser: copy.deepcopy(denoiser_of(pipe))})
    assert run(pipe, objective=lambda maps, text: (run(copied), tsam.l1(maps, text))[1]).losses.isfinite().all()


@only_sd
def test_a_short_prompts_t_goes_with_embeddings_that_are_padded_to_a_longer_negative_prompts(pipe):
    text, (embeds, negative) = pipe.get_text_self_attention(SHORT), pipe.encode_prompt(SHORT, "cpu", 1, True)
    given = {"prompt_embeds": embeds.repeat(1, 2, 1), "negative_prompt_embeds": negative.repeat(1, 2, 1)}  # as compel
    losses = run(pipe, None, **given, text_self_attention=text).losses
    assert losses[0, -1] < losses[0, 0]
    cut = pipe.get_text_self_attention(" ".join([PROMPT] * 20))
    with refused(pipe, ValueError, "give it the `max_sequence_length` that they were made with"):
        run(pipe, None, **given, text_self_attention=cut)


def test_a_denoiser_that_skips_a_layer_is_told_of_and_draws_without_t_sam(pipe):
    blocks = {name: value for name, value in kind_of(pipe).call.items() if name == "attention_layers"}
    layer = pipe.layers_of(pipe.settings(**blocks))[0]
    with tsam_pipeline.shadowed(layer, "forward", lambda hidden_states, *args, **kwargs: hidden_states):
        with pytest.raises(RuntimeError, match="maps of one size were expected, but .* came.* DeepCache"):
            run(pipe)
        assert run(pipe, tsam_steps=0).images.isfinite().all()
    assert run(pipe).losses.isfinite().all()
