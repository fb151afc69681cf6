"""The single files that there are: how their networks are told by names, and what configuration names and shapes tell.

`PREFIXES` and `BARE` say which network a name belongs to, `KINDS` which family of pipelines a file is of, and `CONFIGS`
makes a network's configuration of its original names and the shapes of what they name. single_file.py loads by these.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]  # name -> shape, within one network

DENOISER = "model.diffusion_model."
PREFIXES = (  # (what names begin with, component, class)
    (DENOISER, "unet", "UNet2DConditionModel"),
    ("first_stage_model.", "vae", "AutoencoderKL"),
    ("control_model.", "controlnet", "ControlNetModel"),
    ("cond_stage_model.transformer.", "text_encoder", "CLIPTextModel"),
    ("cond_stage_model.model.", "text_encoder", "CLIPTextModel"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "CLIPTextModel"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("conditioner.embedders.0.model.", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "CLIPTextModelWithProjection"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "T5EncoderModel"),
)
BARE = (  # (a name in a file of one network alone, component, class), the first that is there
    (r"joint_blocks\.0\.x_block\.attn\.qkv\.weight", "transformer", "SD3Transformer2DModel"),
    (r"(input_hint_block\.0|controlnet_cond_embedding\.conv_in)\.weight", "controlnet", "ControlNetModel"),
    (r"(input_blocks\.0\.0|down_blocks\.0\.resnets\.0\.conv1)\.weight", "unet", "UNet2DConditionModel"),
    (r"double_blocks\.0\.img_attn\.qkv\.weight", "transformer", "FluxTransformer2DModel"),
    (r"encoder\.(down\.0\.block|down_blocks\.0\.resnets)\.0\.conv1\.weight", "vae", "AutoencoderKL"),
    (r"Mixed_7c\.branch1x1\.conv\.weight", "inception", "InceptionV3"),
)
# What networks here leave out: numbers of places, the loss, OpenCLIP's own head and, in Stable Diffusion 2, last layer.
IGNORED = r".*position_ids|logit_scale|text_projection|transformer\.resblocks\.\d+\..*|loss\..*|model_ema\..*"


class Kind(NamedTuple):
    """A family of single files, told by its text encoders."""

    pipeline: str
    prefixes: frozenset[str]  # of the text encoders
    tokenizers: str  # the repository that has them
    scheduler: tuple[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = {}
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    denoiser: str = "unet"


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_EULER = ("EulerDiscreteScheduler", {**_BETAS, "timestep_spacing": "leading"})
_DDIM = {**_BETAS, "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}
KINDS = (
    Kind(
        "StableDiffusionPipeline",
        frozenset({"cond_stage_model.transformer."}),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ("PNDMScheduler", {**_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}),
    ),
    Kind(
        "StableDiffusionPipeline",
        frozenset({"cond_stage_model.model."}),
        "stabilityai/stable-diffusion-2-1",
        ("DDIMScheduler", _DDIM),
    ),
    Kind(
        "StableDiffusionXLPipeline",
        frozenset({"conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."}),
        "stabilityai/stable-diffusion-xl-base-1.0",
        _EULER,
        {"force_zeros_for_empty_prompt": True},
        0.13025,
    ),
    Kind(
        "StableDiffusionXLImg2ImgPipeline",
        frozenset({"conditioner.embedders.0.model."}),
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        _EULER,
        {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
        0.13025,
    ),
    *(
        Kind(
            "StableDiffusion3Pipeline",
            frozenset(f"text_encoders.{name}.transformer." for name in encoders),
            "stabilityai/stable-diffusion-3-medium-diffusers",
            ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
            {},
            1.5305,
            0.0609,
            "transformer",
        )
        for encoders in (("clip_l", "clip_g", "t5xxl"), ("clip_l", "clip_g"))
    ),
)


# --- the configuration behind names and shapes ------------------------------------------------------------------------


def _count(shapes: Shapes, name: str) -> int:
    """How many of name.format(0), name.format(1), … there are."""
    return next(i for i in itertools.count() if name.format(i) not in shapes)


def _first(shapes: Shapes, ending: str) -> tuple[int, ...]:
    return next(shape for name, shape in shapes.items() if name.endswith(ending))


def _encoder(shapes: Shapes) -> dict[str, Any]:
    """What U-Net and ControlNet have in common: stages of blocks, each closed by a convolution that halves the size."""
    stages: list[list[tuple[int, int]]] = [[]]  # (channels, transformer blocks)
    for i in range(1, _blocks(shapes, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            stages.append([])
        else:
            depth = _count(shapes, f"input_blocks.{i}.1.transformer_blocks.{{}}.attn1.to_q.weight")
            stages[-1].append((shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0], depth))
    widths, depths = ([stage[0][k] for stage in stages] for k in (0, 1))
    linear = len(_first(shapes, "proj_in.weight")) == 2
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "block_out_channels": widths,
        "layers_per_block": len(stages[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "cross_attention_dim": _first(shapes, "attn2.to_k.weight")[1],
        "use_linear_projection": linear,
        # Version 1 has eight heads everywhere; those that project linearly have heads of 64.
        "attention_head_dim": [width // 64 for width in widths] if linear else 8,
    }
    middle = _count(shapes, "middle_block.1.transformer_blocks.{}.attn1.to_q.weight")
    depths = [depth or (middle if i == len(depths) - 1 else 1) for i, depth in enumerate(depths)]
    config["transformer_layers_per_block"] = depths[0] if len(set(depths)) == 1 else depths
    if "label_emb.0.0.weight" in shapes:
        told = shapes["label_emb.0.0.weight"][1]
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": told}
        config["addition_time_embed_dim"] = 256
    elif "label_emb.weight" in shapes:
        config["num_class_embeds"] = shapes["label_emb.weight"][0]
    return config


def _blocks(shapes: Shapes, name: str) -> int:
    return 1 + max(int(match[1]) for n in shapes if (match := re.match(rf"{name}\.(\d+)\.", n)))


def _unet(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    config = _encoder(shapes)
    up = [block.replace("Down", "Up") for block in reversed(config["down_block_types"])]
    return config | {"up_block_types": up, "out_channels": shapes["out.2.weight"][0]}


def _controlnet(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    hints = _blocks(shapes, "input_hint_block")
    channels = [shapes[f"input_hint_block.{i}.weight"][0] for i in range(0, hints - 2, 4)]
    return _encoder(shapes) | {"conditioning_embedding_out_channels": channels}


def _autoencoder(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    depth, stages = _count(shapes, "encoder.down.0.block.{}.conv1.weight"), _blocks(shapes, r"encoder\.down")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(stages)],
        "layers_per_block": depth,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "scaling_factor": kind.scaling_factor if kind else 0.18215,
        "shift_factor": kind.shift_factor if kind else None,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def _sd3(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    layers = _count(shapes, "joint_blocks.{}.x_block.attn.qkv.weight")
    width = shapes["x_embedder.proj.weight"][0]
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (64,))[0]
    words, pooled = shapes["context_embedder.weight"], shapes["y_embedder.mlp.0.weight"][1]
    return {
        "patch_size": (patch := shapes["x_embedder.proj.weight"][-1]),
        "in_channels": shapes["x_embedder.proj.weight"][1],
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": words[1],
        "caption_projection_dim": words[0],
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }


def _t5(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    entries, width = shapes["shared.weight"]
    first = "encoder.block.0.layer.{}."
    inner, heads = first.format(0) + "SelfAttention.q.weight", "SelfAttention.relative_attention_bias.weight"
    buckets, heads = shapes[first.format(0) + heads]
    return {
        "vocab_size": entries,
        "d_model": width,
        "d_kv": shapes[inner][0] // heads,
        "d_ff": shapes[first.format(1) + "DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, "encoder.block.{}.layer.0.layer_norm.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _text_encoder(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    if "token_embedding.weight" not in shapes:  # transformers' own names
        root = "text_model.embeddings."
        layers, act = _count(shapes, "text_model.encoder.layers.{}.mlp.fc1.weight"), "quick_gelu"
        inner = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
        places, projection = shapes[f"{root}position_embedding.weight"][0], None
        if "text_projection.weight" in shapes:
            projection, act = shapes["text_projection.weight"][0], "quick_gelu" if inner < 4096 else "gelu"
    else:
        root = ""
        layers, act = _count(shapes, "transformer.resblocks.{}.mlp.c_fc.weight"), "gelu"
        inner, places = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0], shapes["positional_embedding"][0]
        projection = shapes.get("text_projection", (0, None))[1]
        if kind is not None and kind.pipeline == "StableDiffusionPipeline":
            layers -= 1  # version 2 reads the last layer but one, and leaves the last in the file
    entries, width = shapes[f"{root}token_embedding.weight"]
    return {
        "vocab_size": entries,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": places,
        "projection_dim": projection or width,
        "hidden_act": act,
        "bos_token_id": entries - 2,
        "eos_token_id": entries - 1,
    }


def _flux(shapes: Shapes, kind: Kind | None) -> dict[str, Any]:
    (width, channels), head = shapes["img_in.weight"], shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": _count(shapes, "double_blocks.{}.img_attn.qkv.weight"),
        "num_single_layers": _count(shapes, "single_blocks.{}.linear1.weight"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


CONFIGS: dict[str, Callable[[Shapes, Kind | None], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _controlnet,
    "AutoencoderKL": _autoencoder,
    "FluxTransformer2DModel": _flux,
    "CLIPTextModel": _text_encoder,
    "CLIPTextModelWithProjection": _text_encoder,
    "SD3Transformer2DModel": _sd3,
    "T5EncoderModel": _t5,
    "InceptionV3": lambda shapes, kind: {},
}
