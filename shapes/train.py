"""Train what ships in this folder, from nothing:

    python -m diffusers_tsam.shapes.train --output shapes                       # about 70 minutes on two cores
    python -m diffusers_tsam.shapes.train --output shapes --stages vae,pixart   # its transformer twin, about 75
    python -m diffusers_tsam.shapes.train --output shapes --stages sd3   # a small SD3, of the others' VAE and T5
    python -m diffusers_tsam.shapes.train --output shapes --stages sink --batch 48  # `sd` with an attention sink

Every stage is seeded, saves a checkpoint every few minutes and resumes from it when started again.
"""

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from . import MODELS, SD3_TOKENS
from .judge import Judge
from .scenes import (
    COLOURS,
    GRID,
    PAIRS,
    SIZE,
    SOLIDS,
    caption_of,
    random_scene,
    random_solids,
    words_of_solids,
)
from .sink import WEIGHTS, changes_of


STAGES = ("judge", "vae", "sd", "pixart", "sd3", "sink")
STEPS = {"sd": 2_300, "pixart": 4_500, "sd3": 6_000, "sink": 1_200}
MAX_TOKENS = 32
WORDS = [*COLOURS, *SOLIDS, "a", "an", "and", "with", "the", "next", "to", "of", ","]
EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance
GROUNDING = 0.03  # weight of the share of a word's map off its solid (TokenCompose, Wang et al. 2024)
EMA_DECAY = 0.999
WARMUP = 100  # steps
DECODER_NOISE = 0.05  # what a sampler leaves in a latent
CHECKPOINT_SECONDS = 120
IDENTITY = 35.0  # the sink encoder's weight of a word itself against what it attends to, as in large CLIPs
PLACE = 2.0  # its weight of the word's place, low because a denoiser could read from it who belongs to whom
SINK_STEPS = 4_000
SINK_WEIGHT = 0.3


def build_clip_tokenizer(max_tokens=MAX_TOKENS):
    """A CLIPTokenizer with a token per caption word; it splits anything else into bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [a + b for a, b in merges if a + b not in tokens] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def build_t5_tokenizer():
    """A T5Tokenizer with a token per caption word; it splits anything else into printable characters."""
    characters = [chr(code) for code in range(33, 127)]
    pieces = [("▁" + word, -1.0) for word in WORDS] + [("▁", -2.0)] + [(character, -10.0) for character in characters]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *dict(pieces).items()]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def build_vae():
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def shipped_vae():
    vae = build_vae()  # not loaded, because it would keep its folder's name
    vae.load_state_dict(AutoencoderKL.from_pretrained(MODELS["sd"] / "vae", dtype=torch.float32).state_dict())
    return vae


def build_clip(tokenizer, cls=CLIPTextModel, width=128):
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer):
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",  # like T5 1.1, PixArt's
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build_unet(width=64):
    return UNet2DConditionModel(
        sample_size=GRID,
        block_out_channels=(width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=2 * width,
        attention_head_dim=4,  # as in SD 1.x, this is the number of heads
        norm_num_groups=16,
    )


def build_transformer():
    """Narrow, as deep as blocks 10 to 18 need; initialised like PixArt, from an identity."""
    transformer = PixArtTransformer2DModel(
        sample_size=GRID,
        patch_size=2,
        num_layers=20,
        num_attention_heads=4,
        attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=128,
        in_channels=4,
        out_channels=4,
    )
    nn.init.normal_(transformer.adaln_single.linear.weight, std=0.02)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def build_joint_transformer():
    """Like SD 3.5's, small; every block starts as an identity (adaLN-Zero, Peebles and Xie 2023)."""
    transformer = SD3Transformer2DModel(
        sample_size=GRID,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        num_attention_heads=3,
        attention_head_dim=32,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=GRID,
        qk_norm="rms_norm",
    )
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for linear in modulations:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_scheduler():
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class Run:
    """One stage's loop: learning rate, progress, checkpoint and resumption.

    modules: {name: module}, trained together; the only other state is the step, which gives the seeds.
    """

    def __init__(self, name, args, modules, steps, rate, ema=False):
        self.path = args.work / f"{name}.pt"
        self.name, self.modules, self.steps, self.rate, self.step = name, modules, steps, rate, 0
        self.seed = sum(map(ord, name)) + args.seed
        parameters = [p for module in modules.values() for p in module.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.ema = [p.detach().clone() for p in parameters] if ema else None
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step, self.ema = state["step"], state["ema"]
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            print(f"{name}: resumed at step {self.step}", flush=True)

    def save(self):
        state = {
            "step": self.step,
            "ema": self.ema,
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").rename(self.path)

    def __call__(self, loss_of):
        """loss_of(rng, generator) -> (loss, {name: number tensor}), called once per step with the step's seeds."""
        started = saved = time.time()
        first, means = self.step, {}
        while self.step < self.steps:
            seed = [self.seed, self.step]
            rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
            warm = min(1.0, (self.step + 1) / WARMUP)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * self.step / self.steps)) / 2)
            loss, logs = loss_of(rng, generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            if self.ema is not None:
                decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)
            for key, value in {"loss": loss, **logs}.items():
                means[key] = means.get(key, 0) + value.detach().item() / 50
            if self.step % 50 == 0:
                seconds = (time.time() - started) / (self.step - first)
                numbers = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                print(f"{self.name} {self.step}/{self.steps}  {numbers}  {seconds:.2f} s/step", flush=True)
                means = {}
            if time.time() - saved > CHECKPOINT_SECONDS or self.step == self.steps:
                self.save()
                saved = time.time()
        if self.ema is not None:
            for parameter, average in zip(self.parameters, self.ema):
                parameter.data.copy_(average)
        for module in self.modules.values():
            module.eval().requires_grad_(False)


def autocast(args):
    return torch.autocast(args.device, torch.bfloat16, enabled=not args.float32)


def to_tensor(images, args):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in -1 to 1."""
    images = torch.from_numpy(np.stack(images)).to(args.device).permute(0, 3, 1, 2)
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def train_judge(args):
    judge = Judge().to(args.device, memory_format=torch.channels_last)
    run = Run("judge", args, {"judge": judge}, args.judge_steps, 2e-3)

    def loss_of(rng, generator):
        judge.train()
        scenes = [random_scene(rng, "train") for _ in range(64)]
        images = to_tensor([scene.image for scene in scenes], args)
        images = images + 0.16 * rng.random() * torch.randn(images.shape, generator=generator).to(args.device)
        if rng.random() < 0.5:  # a decoder's blur, at the half size that the judge reads
            images = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear")
        targets = torch.tensor([[float(pair in scene.solids) for pair in PAIRS] for scene in scenes])
        with autocast(args):
            logits = judge(images)
        return F.binary_cross_entropy_with_logits(logits.float(), targets.to(args.device), reduction="sum") / 64, {}

    run(loss_of)
    save_file({k: v.contiguous() for k, v in judge.cpu().state_dict().items()}, args.output / "judge.safetensors")


def train_vae(args):
    """Train from nothing, or with another's latents, `args.latents_of`, so that denoisers trained on those stay."""
    vae = build_vae().to(args.device, memory_format=torch.channels_last)
    if args.latents_of:
        return train_vae_alike(args, vae, AutoencoderKL.from_pretrained(args.latents_of, dtype=torch.float32))
    run = Run("vae", args, {"vae": vae}, args.vae_steps, 2e-3, ema=True)

    def loss_of(rng, generator):
        images = to_tensor([random_scene(rng).image for _ in range(32)], args)
        with autocast(args):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + 2 * error.square().mean() + 1e-3 * kl, {"mse": error.square().mean(), "kl": kl}

    run(loss_of)
    return vae.float()


def train_vae_alike(args, vae, other):
    """Train `vae` to encode as `other` encodes the picture at its own size, and to decode the result."""
    vae.register_to_config(scaling_factor=other.config.scaling_factor)
    other.to(args.device, memory_format=torch.channels_last).eval()
    smaller = 2 ** (len(vae.config.block_out_channels) - len(other.config.block_out_channels))
    run = Run("vae-alike", args, {"vae": vae}, args.vae_steps, 2e-3, ema=True)

    def loss_of(rng, generator):
        images = to_tensor([random_scene(rng).image for _ in range(32)], args)
        with autocast(args):
            with torch.no_grad():
                wanted = other.encode(F.avg_pool2d(images, smaller)).latent_dist
            found = vae.encode(images).latent_dist
            noise = torch.randn(wanted.mean.shape, generator=generator).to(args.device)
            decoded = vae.decode(wanted.mean + DECODER_NOISE * noise).sample.float()
        error = decoded - images
        apart, mse = F.mse_loss(found.mean, wanted.mean), error.square().mean()
        spread = F.mse_loss(found.logvar, wanted.logvar)
        return error.abs().mean() + mse + apart + 0.01 * spread, {"mse": mse, "latents": apart}

    run(loss_of)
    return vae.float()


def train_decoder(args, vae):
    """Sharpen the decoder on the encoder's means, the latents that the diffusion model learns."""
    decoder = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    run = Run("decoder", args, decoder, args.decoder_steps, 1e-3, ema=True)
    vae.decoder.requires_grad_(True).train()
    vae.post_quant_conv.requires_grad_(True)

    def loss_of(rng, generator):
        images = to_tensor([random_scene(rng).image for _ in range(32)], args)
        with autocast(args):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator).to(args.device)
            decoded = vae.decode(latents + DECODER_NOISE * noise).sample.float()
        error = decoded - images
        return error.abs().mean() + error.square().mean(), {"mse": error.square().mean()}

    run(loss_of)


class GroundedAttnProcessor:
    """Plain attention, here faster than the fused one. Keeps cross-attention's probabilities, averaged over heads, in
    `maps` for the grounding loss."""

    def __init__(self, maps):
        self.maps = maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        scores = q @ k.transpose(-1, -2) * attn.scale
        if attention_mask is not None:
            scores = scores + attention_mask.unsqueeze(1)
        probabilities = scores.softmax(-1)
        if encoder_hidden_states is not None:
            self.maps.append(probabilities.mean(1))
        return attn.to_out[0]((probabilities @ v).transpose(1, 2).flatten(2))


class GroundedJointAttnProcessor:
    """SD3's joint attention, likewise: keeps what image rows give to T5's columns and CLIP's of the same words."""

    def __init__(self, maps):
        self.maps = maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        image, text = hidden_states, encoder_hidden_states
        q = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        k = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        v = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], 2)
        probabilities = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        positions = image.shape[1]
        words = probabilities[:, :, :positions, positions:].mean(1)
        self.maps += [words[..., SD3_TOKENS:], words[..., 1:SD3_TOKENS]]  # CLIP's begin after its <bos>
        image, text = (probabilities @ v).transpose(1, 2).flatten(2).split([positions, text.shape[1]], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def grounding_loss(maps, masks, words):
    """Share of a colour's or noun's attention off its solid.

    maps: list of (B, P, N), P a square grid; masks (B, 3, GRID, GRID); words (B, 3, 2) token positions, 0 for none.
    """
    losses = []
    present = (words > 0).flatten(1)
    for layer in maps:
        batch, positions, _ = layer.shape
        side = math.isqrt(positions)
        mask = F.adaptive_avg_pool2d(masks, side).flatten(2).repeat_interleave(2, 1)  # (B, 6, P)
        word = layer.float().gather(2, words.flatten(1)[:, None].expand(batch, positions, -1)).transpose(1, 2)
        off = 1 - (word * mask).sum(-1) / word.sum(-1)
        losses.append((off * present).sum() / present.sum())
    return torch.stack(losses).mean()


def identity(*modules):
    """A digest of their weights."""
    known = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            known.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return known.hexdigest()[:16]


def latents_of(args, vae, number):
    """Encode `number` scenes once: latents of unit variance, masks, captions."""
    path = args.work / f"latents{number}-{identity(vae.encoder, vae.quant_conv)}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    rng = np.random.default_rng(1)
    latents, masks, captions = [], [], []
    for _ in range(number // 100):
        scenes = [random_scene(rng) for _ in range(100)]
        with torch.no_grad(), autocast(args):
            mean = vae.encode(to_tensor([scene.image for scene in scenes], args)).latent_dist.mean
        latents.append(mean.float().cpu())
        masks.append(torch.from_numpy(np.stack([scene.masks for scene in scenes])).half())
        captions += [scene.caption for scene in scenes]
    latents = torch.cat(latents)
    scale = 1 / latents.std().item()
    data = {"latents": (latents * scale).half(), "masks": torch.cat(masks), "captions": captions, "scale": scale}
    torch.save(data, path)
    return data


def train_sd(args, vae):
    """Stable Diffusion's UNet and CLIP."""
    tokenizer, unet = build_clip_tokenizer(), build_unet(args.width).to(memory_format=torch.channels_last)
    text_encoder, scheduler = build_clip(tokenizer, width=2 * args.width), build_scheduler()

    def predict(noisy, timesteps, tokens):
        return unet(noisy, timesteps, text_encoder(tokens)[0]).sample

    train_diffusion("sd", args, vae, unet, [text_encoder], scheduler, [(tokenizer, MAX_TOKENS)], predict)
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def train_pixart(args, vae):
    """PixArt-α's transformer and T5."""
    tokenizer, transformer = build_t5_tokenizer(), build_transformer()
    text_encoder, scheduler = build_t5(tokenizer), build_scheduler()

    def predict(noisy, timesteps, tokens):
        attended = tokens != tokenizer.pad_token_id
        states = text_encoder(tokens, attention_mask=attended)[0]
        return transformer(noisy, states, timesteps, encoder_attention_mask=attended.float()).sample

    train_diffusion("pixart", args, vae, transformer, [text_encoder], scheduler, [(tokenizer, 12)], predict)
    return PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


def train_sd3(args):
    """SD3's joint transformer, one CLIP in both places, and the small PixArt-α's T5, trained on without its mask."""
    vae = shipped_vae().to(args.device)
    vae.register_to_config(shift_factor=0.0)
    clip_tokenizer, tokenizer = build_clip_tokenizer(SD3_TOKENS), build_t5_tokenizer()
    clip = build_clip(clip_tokenizer, CLIPTextModelWithProjection, width=64)
    t5 = T5EncoderModel.from_pretrained(MODELS["pixart"] / "text_encoder", dtype=torch.float32)
    transformer, scheduler = build_joint_transformer(), FlowMatchEulerDiscreteScheduler()

    def predict(noisy, timesteps, tokens):
        tokens, clip_tokens = tokens.split(SD3_TOKENS, 1)
        output = clip(clip_tokens, output_hidden_states=True)
        words, pooled = output.hidden_states[-2].repeat(1, 1, 2), output.text_embeds.repeat(1, 2)
        return transformer(noisy, torch.cat([words, t5(tokens)[0]], 1), pooled, timesteps).sample

    tokenizers = [(tokenizer, SD3_TOKENS), (clip_tokenizer, SD3_TOKENS)]
    train_diffusion("sd3", args, vae, transformer, [t5, clip], scheduler, tokenizers, predict)
    return StableDiffusion3Pipeline(
        transformer, scheduler, vae, clip, clip_tokenizer, clip, clip_tokenizer, t5, tokenizer
    )


def fit_sink(args, text_encoder, tokenizer):
    """Let <bos> take the share `args.sink` of every later token's attention, and keep who attends to whom in the rest.

    The paper finds such a sink in CLIP: T still tells the syntax, but hardly any of it reaches the embeddings. Only
    queries and keys are trained, against the encoder's attention before. The other changes need no training: the
    output's bias subtracts the constant that the sink adds to a token; a word's embedding is made large, because
    otherwise nothing of the word would pass a sink; and its place is made small beside it, because words that belong
    together are neighbours.
    """
    text_encoder.set_attn_implementation("eager")  # sdpa returns no attention
    before = copy.deepcopy(text_encoder).eval().requires_grad_(False)
    text_encoder.requires_grad_(False)
    text_encoder.embeddings.token_embedding.weight *= IDENTITY  # the first layer normalises it away again
    text_encoder.embeddings.position_embedding.weight *= PLACE
    attentions, values = [layer.self_attn for layer in text_encoder.encoder.layers], []
    for attention in attentions:
        hook = attention.v_proj.register_forward_hook(lambda *call: values.append(call[-1]))
        text_encoder(torch.tensor([[tokenizer.bos_token_id]]))
        hook.remove()
        attention.out_proj.bias -= args.sink * (attention.out_proj.weight @ values[-1][0, 0])
    trained = nn.ModuleList([nn.ModuleList([attention.q_proj, attention.k_proj]) for attention in attentions])
    run = Run(f"sink-encoder-{args.sink}", args, {"trained": trained.requires_grad_(True)}, SINK_STEPS, 4e-3)

    def loss_of(rng, generator):
        captions = [caption_of(random_solids(rng, int(rng.integers(1, 4)))) for _ in range(64)]
        ids = tokenizer(captions, padding="max_length", max_length=14, return_tensors="pt").input_ids
        wanted, found = (
            torch.stack(encoder(ids, output_attentions=True).attentions)[..., 1:, :].clamp(min=1e-9)
            for encoder in (before, text_encoder)
        )  # (layers, 64, heads, tokens but <bos>, tokens)
        wanted, others = (x[..., 1:] / x[..., 1:].sum(-1, keepdim=True) for x in (wanted, found))
        apart = (wanted * (wanted / others).log()).sum(-1).mean((1, 2, 3)).sum()
        odds = (found[..., 0] / found[..., 1:].sum(-1)).log()
        sink = (odds - math.log(args.sink / (1 - args.sink))).square().mean((1, 2, 3)).sum()
        return apart + SINK_WEIGHT * sink, {"apart": apart, "share": found[..., 0].mean()}

    run(loss_of)
    text_encoder.set_attn_implementation("sdpa")


def train_sink(args):
    """Give the shipped Stable Diffusion's text encoder an attention sink, and train on its UNet's transformer blocks;
    the convolutions stay."""
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["sd"])
    fit_sink(args, pipe.text_encoder, pipe.tokenizer)

    def predict(noisy, timesteps, tokens):
        return pipe.unet(noisy, timesteps, pipe.text_encoder(tokens)[0]).sample

    parts = (pipe.vae, pipe.unet, [pipe.text_encoder], build_scheduler(), [(pipe.tokenizer, MAX_TOKENS)], predict)
    transformers = [module for module in pipe.unet.modules() if isinstance(module, Transformer2DModel)]
    # Not GroupNorm, because its backward pass crashes torch 2.13 on a CPU if its input needs no gradient
    trained = nn.ModuleList(part for t in transformers for part in (t.proj_in, t.transformer_blocks, t.proj_out))
    train_diffusion(f"sink-{args.sink}", args, *parts, trained)
    return pipe


def noised(scheduler, latents, noise, generator):
    """Latents (B, ...) at random times: the denoiser's input, the timesteps, and the target of its prediction."""
    if hasattr(scheduler, "get_velocity"):
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator).to(latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        return noisy, timesteps, scheduler.get_velocity(latents, noise, timesteps)
    sigmas = torch.randn(len(latents), generator=generator).sigmoid().to(latents)  # as in SD3 (Esser et al. 2024)
    return latents.lerp(noise, sigmas[:, None, None, None]), 1000 * sigmas, noise - latents


def train_diffusion(name, args, vae, denoiser, text_encoders, scheduler, tokenizers, predict, trained=None):
    """Train denoiser and text encoders, or only their part in `trained`, on captions.

    predict(noisy, timesteps, tokens): tokens of all `tokenizers` (pairs of a tokenizer and its number of tokens) side
    by side.
    """
    data = latents_of(args, vae, args.scenes)
    vae.register_to_config(scaling_factor=data["scale"])
    text_encoder = text_encoders[0] if len(text_encoders) == 1 else nn.ModuleList(text_encoders)
    denoiser.to(args.device), text_encoder.to(args.device)
    sizes = (sum(p.numel() for p in module.parameters()) for module in (denoiser, text_encoder))
    print("denoiser {:,} parameters, text encoders {:,}".format(*sizes), flush=True)
    maps = []
    stock = denoiser.attn_processors
    joint = isinstance(denoiser, SD3Transformer2DModel)
    denoiser.set_attn_processor((GroundedJointAttnProcessor if joint else GroundedAttnProcessor)(maps))

    def tokenize(captions):
        tokens = [
            tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
            for tokenizer, length in tokenizers
        ]
        return torch.cat(tokens, 1)

    ids, empty = tokenize(data["captions"]), tokenize([""])[0]
    words = torch.zeros(len(ids), 3, 2, dtype=torch.long)
    for index, caption in enumerate(data["captions"]):
        for solid, positions in enumerate(words_of_solids(caption)):
            words[index, solid] = torch.tensor(positions) + (tokenizers[0][0].bos_token_id is not None)
    modules = {"denoiser": denoiser, "text_encoder": text_encoder}
    if trained is not None:
        denoiser.requires_grad_(False), text_encoder.requires_grad_(False)
        modules = {"trained": trained.requires_grad_(True)}
    run = Run(name, args, modules, args.steps or STEPS[name.partition("-")[0]], args.rate, ema=True)
    for module in modules.values():
        module.train()

    def loss_of(rng, generator):
        pick = torch.from_numpy(rng.integers(0, len(ids), args.batch))
        latents = data["latents"][pick].float().to(args.device).to(memory_format=torch.channels_last)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy, timesteps, target = noised(scheduler, latents, noise, generator)
        dropped = torch.rand(args.batch, generator=generator) < EMPTY_CAPTION_SHARE
        tokens = torch.where(dropped[:, None], empty, ids[pick]).to(args.device)
        where = (words[pick] * ~dropped[:, None, None]).to(args.device)
        maps.clear()
        with autocast(args):
            prediction = predict(noisy, timesteps, tokens).float()
            fit = F.mse_loss(prediction, target)
        off = grounding_loss(maps, data["masks"][pick].float().to(args.device), where)
        return fit + GROUNDING * off, {"mse": fit, "off": off}

    run(loss_of)
    denoiser.set_attn_processor(dict(stock))


def save(pipe, path):
    """Save in float16. Text encoders' configs say float32, which diffusers' models use without a given dtype."""
    pipe.to("cpu", torch.float16).save_pretrained(path)
    for config in path.glob("text_encoder*/config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def stages_of(text):
    """Parse --stages into a list."""
    stages = [stage.strip() for stage in text.split(",")]
    for stage in stages:
        if stage not in STAGES:
            raise argparse.ArgumentTypeError(f"{stage!r} is no stage. Pass one or more of {','.join(STAGES)}.")
    return stages


def share_of(text):
    """Parse --sink into a number."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share. Pass a number above 0 and below 1.")
    return float(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("shapes"), help="folder for the finished models")
    parser.add_argument("--work", type=Path, default=Path("training"), help="folder for checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--stages", type=stages_of, default="judge,vae,sd", help=f"some of {','.join(STAGES)} (default: %(default)s)"
    )
    parser.add_argument("--judge-steps", type=int, default=900)
    parser.add_argument("--latents-of", type=Path, help="folder of another VAE, of the same world's pictures")
    parser.add_argument("--vae-steps", type=int, default=450)
    parser.add_argument("--decoder-steps", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=24_000, help="scenes the diffusion model sees")
    parser.add_argument("--steps", type=int, help=f"steps of the diffusion model {STEPS}")
    parser.add_argument("--sink", type=share_of, default=0.99, help="<bos>'s share of a token's attention")
    parser.add_argument("--width", type=int, default=64, help="of sd's UNet at its first level; a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--float32", action="store_true", help="faster on a processor that does not compute in bfloat16"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if "judge" in args.stages:
        train_judge(args)
    if {"vae", "sd", "pixart"} & set(args.stages):
        vae = train_vae(args) if "vae" in args.stages else shipped_vae().to(args.device)
    for name, train in (("sd", train_sd), ("pixart", train_pixart)):
        if name in args.stages:
            pipe = train(args, vae)
            if "vae" in args.stages:
                train_decoder(args, vae)
            save(pipe, args.output / name)
    if "sd3" in args.stages:
        save(train_sd3(args), args.output / "sd3")
    if "sink" in args.stages:
        save_file(changes_of(train_sink(args)), args.output / WEIGHTS.name)


if __name__ == "__main__":
    main()
