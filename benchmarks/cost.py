"""What guidance costs: operations, seconds and memory of T-SAM and of Attend-and-Excite beside the plain pipeline.

    python benchmarks/cost.py  # a CPU: small pictures, few steps, minutes
    python benchmarks/cost.py --size 512 --steps 50 --batch 8 --dtype float16  # a GPU, at 512 and 1024, batch 1, 4, 8

The architectures are those published for Stable Diffusion 1.5 and PixArt-XL-2 (512 pixels), and for the modular blocks
the denoisers of SDXL, SD3 and FLUX.1 (1024), with random weights; T5-XXL is replaced by one narrow layer. Operations
and memory of the first tables are counted by torch on tensors without data, so they are exact at every size; those of
the others are counted while the pictures are drawn.

What it finds goes to results/cost.json, part by part, what takes seconds by card, dtype, size and batch as well;
`report.py` makes the documents' tables of it.
"""

import argparse
import gc
import json
import time
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from diffusers.modular_pipelines import BlockState
from diffusers.utils import logging
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import diffusers_tsam
from diffusers_tsam import FAMILIES, MODULAR, LatentAlignment, TextSelfAttention
from diffusers_tsam.attention_processors import mean_maps, record_cross_attention
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.shapes.train import build_clip_tokenizer, build_t5_tokenizer
from diffusers_tsam.tsam import Syntax, _blur, _places
from diffusers_tsam.tsam_arguments import PRESETS, Settings
from diffusers_tsam.tsam_pipeline import frozen


RESULTS = Path(__file__).parent / "results" / "cost.json"
PROMPT = "a red cube and a blue sphere"
NOUNS = [3, 7]  # what Attend-and-Excite has to be told: the tokens of "cube" and "sphere"
TOKENS = {"sd": 77, "pixart": 120}
BLOCKS = [kind for kind in MODULAR if kind != "anima"]
PIPELINES = {kind: getattr(diffusers_tsam, family.pipeline) for kind, family in FAMILIES.items()}
WAYS = {"plain": {"tsam_steps": 0}, **{name: {"preset": name} for name in PRESETS}}
WAYS |= {f"the best of {n}": {"tsam_steps": 0, "candidates": n} for n in (2, 4, 8)}
for end in ("", "_backward"):  # torch counts attention on a GPU alone
    flash = f"_scaled_dot_product_flash_attention{{}}{end}".format
    flop_registry[getattr(torch.ops.aten, flash("_for_cpu"))] = flop_registry[getattr(torch.ops.aten, flash(""))]


def build_denoiser(kind):
    """The published configuration, random weights."""
    if kind == "pixart":
        return diffusers.PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def build_components(kind):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    components = {
        "vae": diffusers.AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        FAMILIES[kind].denoiser: build_denoiser(kind),
    }
    if kind == "pixart":
        text = T5Config(vocab_size=1000, d_model=4096, d_ff=1024, num_layers=1, num_heads=8, is_encoder_decoder=False)
        encoder = T5EncoderModel(text).eval()  # it has dropout
        return components | {"tokenizer": build_t5_tokenizer(), "text_encoder": encoder}
    tokenizer = build_clip_tokenizer()
    tokenizer.model_max_length = TOKENS[kind]
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    text = CLIPTextConfig(**sizes, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    components |= {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(text).eval()}
    return components | {"safety_checker": None, "feature_extractor": None}


class Counter(TorchDispatchMode):
    """Counts what runs inside: floating-point operations (`flop`), calls of operators, those of them that compute,
    which a GPU launches a kernel for (`kernels`), and the most bytes of tensors that are alive at once (`peak`), with
    what `modules` hold."""

    def __init__(self, *modules):
        super().__init__()
        self.flop = self.calls = self.kernels = self.peak = self._now = 0
        self._alive = set()
        for module in modules:
            if isinstance(module, torch.nn.Module):
                self._add([*module.parameters(), *module.buffers()])

    def _add(self, tensors):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive:
                self._alive.add(key)
                self._now += size
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self._alive.discard(key)
        self._now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.calls += 1
        self.kernels += not function.is_view
        if function.overloadpacket in flop_registry:
            self.flop += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=output)
        self._add(output)
        return output


def counted(calls, *modules):
    """A `Counter` of each call, while these modules are held."""
    found = []
    for call in calls:
        with Counter(*modules) as counter:
            call()
        found.append(counter)
    return found


@contextmanager
def made_in(dtype, device, data=False):
    """Everything is made in `dtype` on a device, unless with data on "meta", on which attention is counted as torch's
    counter knows it, or on "cpu" in `FakeTensorMode`, on which it takes the memory of the fused kernels that a GPU has,
    too.
    """
    fake = nullcontext() if data or device == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        for cached in (_blur, _places):  # before, so that all is counted; behind, so that no fake tensor stays
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(dtype)
        for context in (torch.device(device), fake, torch.no_grad()):
            stack.enter_context(context)
        yield


def alignment_of(columns, first, device, batch=1, **settings):
    """A `LatentAlignment` of a batch of one prompt of nine tokens, which begin at `first` of `columns`."""
    content = torch.zeros(1, columns, dtype=torch.bool)
    content[:, first : first + 9] = True
    text = TextSelfAttention(torch.ones(1, columns, columns), content, [["word"] * 9])
    alignment = LatentAlignment(text, Settings(**settings or {"alpha": 1.0}), batch)
    alignment.text = Syntax(*(part.to(device) if torch.is_tensor(part) else part for part in alignment.text))
    return alignment


def simulate(kind, size, device, batch=1, dtype=torch.bfloat16, measured=counted):
    """What is `measured` of a plain step with classifier-free guidance, of decoding and of a guided pass."""
    alignment = alignment_of(9, 0, device, batch)
    with made_in(dtype, device, data=measured is not counted):
        pipe = PIPELINES[kind](**build_components(kind))
        latents, t = torch.randn(2 * batch, 4, size // 8, size // 8), torch.tensor(1)
        given = {"encoder_hidden_states": torch.randn(2 * batch, TOKENS[kind], 768 if kind == "sd" else 4096)}
        given["timestep"] = t.expand(2 * batch)
        denoiser = getattr(pipe, FAMILIES[kind].denoiser)
        if kind == "pixart":
            denoiser.pos_embed.pos_embed = denoiser.pos_embed.pos_embed.to(latents)  # comes from numpy
            given["encoder_attention_mask"] = torch.ones(2 * batch, TOKENS[kind])
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        layers = pipe.layers_of(pipe.settings())
        calls = (
            lambda: denoiser(latents, **given),
            lambda: pipe.vae.decode(latents[:batch]),
            lambda: pipe.align_latents(alignment, latents[:batch], t, (), given, layers),
        )
        with frozen(denoiser):
            return measured(calls, *pipe.components.values())


def build_modular(kind, size, batch):
    """The published denoiser of blocks with random weights, and what its loop finds in its state."""
    side = size // 8
    if kind == "flux":
        model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        state = {"latents": torch.randn(batch, side**2 // 4, 64), "prompt_embeds": torch.randn(batch, 512, 4096)}
        state |= {"pooled_prompt_embeds": torch.randn(batch, 768), "guidance": torch.ones(batch)}
        state |= {"txt_ids": torch.zeros(512, 3), "img_ids": torch.zeros(side**2 // 4, 3)}
        return model, state
    if kind == "sd3":
        sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
        model = diffusers.SD3Transformer2DModel(pos_embed_max_size=192, **sizes)
        model.pos_embed.pos_embed = model.pos_embed.pos_embed.to(torch.empty(0))  # comes from numpy
        latents, embeds, pooled = 16, (77 + 256, 4096), 2048
    else:
        model = diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        latents, embeds, pooled = 4, (77, 2048), 1280
    state = {"latents": torch.randn(batch, latents, side, side)}
    for name in ("", "negative_"):
        state[f"{name}prompt_embeds"] = torch.randn(batch, *embeds)
        state[f"{name}pooled_prompt_embeds"] = torch.randn(batch, pooled)
        state[f"{name}add_time_ids"] = torch.ones(batch, 6)
    return model, state


def simulate_modular(kind, size, device, batch=1, dtype=torch.bfloat16, measured=counted):
    """As `simulate`, of modular blocks' loop, which does not decode."""
    loop = loop_of(kind)
    defaults = {param.name: param.default for param in loop.inputs if param.name}
    alignment = alignment_of(*{"sdxl": (77, 1), "sd3": (77 + 256, 77), "flux": (512, 0)}[kind], device, batch)
    with made_in(dtype, device, data=measured is not counted):
        model, given = build_modular(kind, size, batch)
        state = BlockState(**{**defaults, **given, "num_inference_steps": 50, "updates": [1]})
        state.alignment, state.given, state.saving = alignment, loop.settings(), nullcontext
        state.layers = loop.layers(model, state.given)
        loop.grid = lambda _: (size // 16,) * 2 if kind == "flux" else state.latents.shape[-2:]
        scheduler = SimpleNamespace(scale_model_input=lambda sample, t: sample)
        components = SimpleNamespace(scheduler=scheduler, num_channels_unet=4, **{loop.denoiser: model})
        components.guider, t = diffusers.ClassifierFreeGuidance(guidance_scale=5.0), torch.tensor(1.0)
        state.scaled_latents = state.latents
        calls = (
            lambda: loop.sub_blocks["denoiser"](components, state, i=0, t=t),
            lambda: loop.align(components, state, 0, t),
        )
        with frozen(model):
            return measured(calls, model)


def loop_of(kind):
    blocks = getattr(diffusers_tsam, MODULAR[kind].blocks)().get_workflow("text2image")
    return blocks.sub_blocks["denoise.denoise"]


SIMULATED = {**dict.fromkeys(PIPELINES, simulate), **dict.fromkeys(BLOCKS, simulate_modular)}


def operations(kinds, size, steps):
    """What one guided pass costs beside a plain step, and the presets' passes: {kind: ...}. The peak is that of
    guidance, beside the largest of the others."""
    found = {}
    for kind in kinds:
        plain, *_, guided = SIMULATED[kind](kind, size, "meta")
        *others, guidance = SIMULATED[kind](kind, size, "cpu")
        found[kind] = {"size": size, "steps": steps, "plain_step_flop": plain.flop, "guided_pass_flop": guided.flop}
        found[kind]["plain_peak_bytes"] = max(counter.peak for counter in others)
        found[kind]["guided_peak_bytes"] = guidance.peak
        found[kind]["passes"] = {name: number_of_updates(kind, name, steps) for name in PRESETS}
    return found


def number_of_updates(kind, preset, steps):
    """Guided passes of a picture."""
    owner = PIPELINES[kind] if kind in PIPELINES else loop_of(kind)
    guided, refined, iterations = owner.settings(preset=preset).plan(steps)
    return guided + iterations * len(refined)


def seconds(device, dtype, size, batch):
    """Milliseconds of a plain step and of a guided pass of every architecture, and by them what each preset makes of a
    picture of 50 steps, beside a plain one, without encoding and decoding: {kind: ...}."""
    found = {}
    for kind, simulated in SIMULATED.items():
        plain, *_, guided = simulated(kind, size, device, batch, dtype, partial(milliseconds, device, 5))
        found[kind] = {"plain step": plain, "guided pass": guided}
        found[kind] |= {name: round(1 + number_of_updates(kind, name, 50) / 50 * guided / plain, 2) for name in PRESETS}
    return found


def launches(kind):
    """What a host has to launch in a plain step and in a guided pass, and of that outside of the network: the maps'
    mean, the loss, its gradient to the maps, and the move."""
    plain, _, guided = simulate(kind, 512, "meta")
    update, stub = update_alone(torch.device("cpu"))
    update()  # what is made once is not counted
    counters = (plain, guided, *counted([update, stub]))
    plain, guided, update, stub = ({"calls": own.calls, "kernels": own.kernels} for own in counters)
    outside = {name: update[name] - stub[name] for name in stub}
    return {"plain step": plain, "guided pass": guided, "outside of the network": outside}


def draw(pipe, **arguments):
    pipe(PROMPT, generator=torch.Generator().manual_seed(0), **arguments)


def measure(pipe, kind, device, arguments):
    """Guided passes, operations, seconds and peak bytes of a call.

    Drawn twice, since counting slows the first, which also warms up.
    """
    passes = []
    denoiser = getattr(pipe, FAMILIES[kind].denoiser)
    hook = denoiser.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    with Counter(*pipe.components.values()) as counter:
        draw(pipe, **arguments)
    hook.remove()
    gc.collect()  # what other calls left would count in the peak
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = clock(device)
    draw(pipe, **arguments)
    seconds = clock(device) - started
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else counter.peak
    return {"guided_passes": sum(passes), "flop": counter.flop, "seconds": round(seconds, 3), "peak_bytes": peak}


def pictures(kind, device, dtype, size, batch, steps):
    """What whole pictures cost, `batch` of them a call, by method: one call after the other, of the same components and
    seed. Attend-and-Excite guides a batch's pictures one after another, and stops where its thresholds are reached."""
    components = build_components(kind)
    tsam = PIPELINES[kind](**components).to(device, dtype)  # and with it what the others share
    options = {"num_inference_steps": steps, "height": size, "width": size, "output_type": "pt"}
    options["num_images_per_prompt"] = batch
    if kind == "pixart":
        options |= {"use_resolution_binning": False, "clean_caption": False}
    rows = {name: (tsam, own) for name, own in WAYS.items()}
    rows["plain"] = (getattr(diffusers, FAMILIES[kind].stock)(**components), {})
    if kind == "sd":
        peer = diffusers.StableDiffusionAttendAndExcitePipeline(**components, requires_safety_checker=False)
        limits = {"max_iter_to_alter": max(steps // 2, 1), "attn_res": (size // 32, size // 32)}
        rows["Attend-and-Excite"] = (peer, {"token_indices": NOUNS, **limits})
    found = {}
    for name, (pipe, more) in rows.items():
        pipe.set_progress_bar_config(disable=True)
        found[name] = measure(pipe, kind, device, options | more)
    return found


def clock(device):
    """Seconds, of the processor on a CPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def milliseconds(device, rounds, calls, *_):
    """The median of each call, which take turns."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times):
            started = clock(device)
            call()
            own.append(clock(device) - started)
    return [round(1e3 * sorted(own)[rounds // 2], 2) for own in times]


def small(device):
    """Seconds of whole pictures of the small models, by preset, beside plain ones: {model: {what: ratio}}."""
    found = {}
    for kind, owner in PIPELINES.items():
        pipe = owner.from_pretrained(MODELS[kind]).to(device)
        pipe.set_progress_bar_config(disable=True)
        given = ARGUMENTS[kind] | {"num_inference_steps": 25, "output_type": "pt"}
        plain, *others = milliseconds(device, 5, [partial(draw, pipe, **given, **own) for own in WAYS.values()])
        found[kind] = {name: round(own / plain, 2) for name, own in zip(WAYS, (plain, *others))}
    return found


def update_alone(device, tokens=9, layers=5, positions=256):
    """One update by the contrast objective of maps that no network made, and the stub of a network alone."""
    recorded = torch.rand(layers, 1, positions, tokens + 1, device=device).softmax(-1)
    alignment = alignment_of(tokens + 1, 1, device, preset="light")
    latents = torch.randn(1, 4, 64, 64, device=device)

    def network(model_input):
        return dict(enumerate(recorded + model_input.mean()))  # its gradient is in place of a backward pass

    def alone():
        with torch.enable_grad():
            model_input = latents.clone().requires_grad_()
            torch.autograd.grad(sum(maps.sum() for maps in network(model_input).values()), model_input)

    return lambda: alignment.update(latents, 1.0, lambda x: mean_maps(network(x), 64, 64, layers)), alone


def overhead(device):
    """Milliseconds of what a guided call does outside of the network, beside a plain step of Stable Diffusion 1.5 at
    512 pixels in float32: `call`, once a call; `update`, the maps' mean, loss, gradient to the maps, and the move."""
    with torch.device(device), torch.no_grad():
        pipe = PIPELINES["sd"](**build_components("sd"))

        def start():
            with frozen(pipe.unet), record_cross_attention(pipe.layers_of(pipe.settings()), 10, stop=True):
                alignment_of(TOKENS["sd"], 1, device, preset="light")

        call, update = milliseconds(device, 20, [start, update_alone(device)[0]])
        batch, states = torch.randn(2, 4, 64, 64), torch.randn(2, TOKENS["sd"], 768)
        (plain,) = milliseconds(device, 3, [lambda: pipe.unet(batch, 1, states)])
    return {"call": call, "update": update, "plain step": plain, "share": round(update / plain, 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--size", type=int, default=256, help="pixels of a side of what takes seconds")
    parser.add_argument("--batch", type=int, default=1, help="pictures of a call that takes seconds")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of the pictures that are drawn")
    parts = ["operations", "modular", "launches", "overhead", "small", "seconds", *PIPELINES]
    words = "%(default)s; the last two draw pictures, and seconds needs a GPU that holds FLUX"
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help=words)
    args = parser.parse_args()
    logging.set_verbosity_error()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    where = f"{name}, {args.dtype}, {args.size} pixels, batch {args.batch}, torch {torch.__version__}"
    given = (device, getattr(torch, args.dtype), args.size, args.batch)
    timed = {"seconds": partial(seconds, *given)}
    timed |= {kind: partial(pictures, kind, *given, args.steps) for kind in PIPELINES}
    calls = {
        "operations": lambda: operations(PIPELINES, 512, 50),
        "modular": lambda: operations(BLOCKS, 1024, 50),
        "launches": lambda: {kind: launches(kind) for kind in PIPELINES},
        "overhead": lambda: overhead(device),
        "small": lambda: small(device),
        **{part: lambda part=part, own=own: {**found.get(part, {}), where: own()} for part, own in timed.items()},
    }
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.parts:
        found[part] = calls[part]()
        print(part, json.dumps(found[part]), flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
