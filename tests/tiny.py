"""Tiny models of every family with random weights, built from nothing in a fraction of a second."""

import diffusers
import torch
import transformers as hf


WORDS = "a an and with black white red blue green car clock cube sphere dog on table the of".split()
ASCII = [chr(code) for code in range(33, 127)]
BYTES = [*ASCII, *map(chr, [*range(161, 173), *range(174, 256), *range(256, 324)])]  # as byte-level BPE writes them


def tiny_tokenizer(length=77, alphabet=ASCII):
    """CLIPTokenizer of WORDS, one token each; other text falls apart into letters, or into bytes if it has BYTES."""
    tokens, merges = alphabet + [letter + "</w>" for letter in alphabet], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the right, so that no word's merges get in another's way
            merge = (parts[-2], parts[-1])
            parts[-2:] = ["".join(merge)]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[-1])
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {token: index for index, token in enumerate(tokens)}
    return hf.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def sharpened(model, factor, *names):
    """Ready to use, with the weights of layers that these names end grown, because random weights attend evenly."""
    for name, layer in model.named_modules():
        if name.endswith(names):
            layer.weight.data *= factor
    return model.eval()


CROSS, JOINT = ("attn2.to_q", "attn2.to_k"), ("to_q", "to_k", "add_q_proj", "add_k_proj")


def tiny_vae(**config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 64}
    return diffusers.AutoencoderKL(**blocks, **sizes, layers_per_block=1, **config).eval()


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny_scheduler():
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def tiny_clip(tokenizer, cls=hf.CLIPTextModel, width=16):
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 24}
    depths = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": tokenizer.model_max_length}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = hf.CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **depths, **tokens)
    return sharpened(cls(config), 12, "q_proj", "k_proj")


def tiny_unet(in_channels, widths, cross_attention_dim, **config):
    """Of blocks with these widths, of which all but the outermost attend to the text."""
    inner = len(widths) - 1
    blocks = {
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * inner),
        "up_block_types": (*["CrossAttnUpBlock2D"] * inner, "UpBlock2D"),
    }
    sizes = {"in_channels": in_channels, "block_out_channels": widths, "cross_attention_dim": cross_attention_dim}
    small = {"sample_size": 32, "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 4}
    return sharpened(diffusers.UNet2DConditionModel(**blocks, **sizes, **small, **config), 4, *CROSS)


def tiny_components(length=77, alphabet=ASCII, in_channels=4):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(length, alphabet)
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_clip(tokenizer),
        "unet": tiny_unet(in_channels, (8, 16), 16),
        "vae": tiny_vae(),
        "scheduler": tiny_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def tiny_controlnet_components():
    """One whose last layers are not zero, as an untrained one's are."""
    components = tiny_components()
    controlnet = diffusers.ControlNetModel.from_unet(
        components["unet"], conditioning_embedding_out_channels=(8, 8)
    ).eval()
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return components | {"controlnet": controlnet}


def tiny_t5_tokenizer():
    """T5Tokenizer of WORDS, one token each; other text falls apart into characters."""
    pieces = {"▁" + word: -1.0 for word in WORDS} | {"▁": -2.0} | {chr(code): -10.0 for code in range(33, 127)}
    return hf.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items()], extra_ids=0)


def tiny_t5(tokenizer, width=16, config=hf.T5Config, cls=hf.T5EncoderModel):
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    of_encoder = {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False}
    return cls(config(vocab_size=len(tokenizer), **sizes, **of_encoder)).eval()


def tiny_pixart_components(sample_size=32, blocks=20, **kwargs):
    """Blocks 10 to 18 and one more; the variance is learned, as in the published PixArt-α. The size's micro-conditions
    (of `sample_size=128`) take a third of the width each."""
    torch.manual_seed(0)
    tokenizer = tiny_t5_tokenizer()
    text_encoder = tiny_t5(tokenizer)
    sizes = {"sample_size": sample_size, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16}
    transformer = diffusers.PixArtTransformer2DModel(num_layers=blocks, num_attention_heads=2, **sizes, **kwargs)
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": tiny_vae(),
        "transformer": sharpened(transformer, 12, *CROSS),
        "scheduler": tiny_scheduler(),
    }


def tiny_wan_components():
    """Frames of maps of a sixteenth of the pixels' side."""
    torch.manual_seed(0)
    tokenizer = tiny_t5_tokenizer()
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        num_layers=4, num_attention_heads=2, attention_head_dim=12, text_dim=16, ffn_dim=32
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer, config=hf.UMT5Config, cls=hf.UMT5EncoderModel),
        "vae": vae.eval(),
        "transformer": sharpened(transformer, 3, "attn2.norm_q"),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer_2": None,
    }


def tiny_sdxl_components(in_channels=4):
    """Cross-attention on grids of 16 and 8, a quarter of the latent's side, at 64 pixels; two text encoders."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24 + 6 * 4}
    unet = tiny_unet(in_channels, (8, 16, 16), 16 + 24, addition_embed_type="text_time", **sizes)
    return {
        "vae": tiny_vae(),
        "text_encoder": tiny_clip(tokenizer),
        "text_encoder_2": tiny_clip(tokenizer, hf.CLIPTextModelWithProjection, 24),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": unet,
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS),
    }


def tiny_sd3_components(**kwargs):
    torch.manual_seed(0)
    tokenizer, tokenizer_3 = tiny_tokenizer(), tiny_t5_tokenizer()
    clips = [tiny_clip(tokenizer, hf.CLIPTextModelWithProjection, width) for width in (8, 16)]
    sizes = {"sample_size": 16, "patch_size": 2, "pos_embed_max_size": 16, "in_channels": 4, "out_channels": 4}
    widths = {"joint_attention_dim": 24, "caption_projection_dim": 16, "pooled_projection_dim": 24}
    heads = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = diffusers.SD3Transformer2DModel(**sizes, **widths, **heads, **kwargs)
    return {
        "vae": tiny_vae(shift_factor=0.0),
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": tiny_t5(tokenizer_3, 24),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer_3,
        "transformer": sharpened(transformer, 3, *JOINT),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def tiny_flux_components():
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_t5_tokenizer()
    sizes = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    heads = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}
    transformer = diffusers.FluxTransformer2DModel(**sizes, **heads)
    return {
        "vae": tiny_vae(shift_factor=0.0),
        "text_encoder": tiny_clip(tokenizer),
        "text_encoder_2": tiny_t5(tokenizer_2, 24),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "transformer": sharpened(transformer, 2, "norm_q", "norm_added_q"),  # RMSNorm undoes larger queries
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def tiny_anima_components():
    """Qwen3's tokens are bytes, so that a prompt has other numbers of them and of T5's. No padding mask, which needs
    torchvision."""
    torch.manual_seed(0)
    vocab = {piece: number for number, piece in enumerate([*BYTES, "<|endoftext|>"])}
    tokenizer = hf.Qwen2Tokenizer(vocab=vocab, merges=[])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    config = hf.Qwen3Config(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes)
    text_encoder = hf.Qwen3Model(config)
    t5_tokenizer = tiny_t5_tokenizer()
    widths = dict.fromkeys(("source_dim", "target_dim", "model_dim"), 16)
    sizes = {"num_layers": 2, "target_vocab_size": len(t5_tokenizer), "min_sequence_length": 24}
    conditioner = diffusers.AnimaTextConditioner(num_attention_heads=2, **widths, **sizes)
    heads = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16}
    sizes = {"mlp_ratio": 2.0, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32)}
    transformer = diffusers.CosmosTransformer3DModel(**heads, **sizes, concat_padding_mask=False)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True]
    )
    return {
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "t5_tokenizer": t5_tokenizer,
        "text_conditioner": conditioner.eval(),
        "transformer": sharpened(transformer, 3, "attn2.norm_q"),
        "vae": vae.eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
