"""What the original code bases (LDM, SGM, OpenCLIP) call the parameters that diffusers and transformers named anew.

One table of (regex, replacement) for each network turns today's name into the original one; every rule is applied, in
order. A single file is read by looking the original names up in it, and a LoRA trained on the original network is read
by the same table. Two endings say that a tensor is part of another: `name[2]` is the last third of its rows (OpenCLIP
keeps queries, keys and values in one), `name.T` its transpose.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from flaxdiff.checkpoint.tensors import Tensor, Tensors
from flaxdiff.core import Spec

Rules = tuple[tuple[str, str | Callable[..., str]], ...]  # a function is given the groups, which are numbers

RESNET: Rules = (
    (r"(resnets\.\d+)\.norm1\b", r"\1.in_layers.0"),
    (r"(resnets\.\d+)\.conv1\b", r"\1.in_layers.2"),
    (r"(resnets\.\d+)\.time_emb_proj\b", r"\1.emb_layers.1"),
    (r"(resnets\.\d+)\.norm2\b", r"\1.out_layers.0"),
    (r"(resnets\.\d+)\.conv2\b", r"\1.out_layers.3"),
    (r"(resnets\.\d+)\.conv_shortcut\b", r"\1.skip_connection"),
)
OPEN_CLIP: Rules = (
    (r"^text_model\.embeddings\.token_embedding\b", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.encoder\.layers\b", "transformer.resblocks"),
    (r"^text_model\.final_layer_norm\b", "ln_final"),
    (r"^text_projection\.weight$", "text_projection.T"),
    (r"\.layer_norm(\d)\b", r".ln_\1"),
    (r"\.mlp\.fc1\b", ".mlp.c_fc"),
    (r"\.mlp\.fc2\b", ".mlp.c_proj"),
    (r"\.self_attn\.q_proj\.(\w+)$", r".attn.in_proj_\1[0]"),
    (r"\.self_attn\.k_proj\.(\w+)$", r".attn.in_proj_\1[1]"),
    (r"\.self_attn\.v_proj\.(\w+)$", r".attn.in_proj_\1[2]"),
    (r"\.self_attn\.out_proj\b", ".attn.out_proj"),
)


def _unet(config: Any) -> Rules:
    n = config.layers_per_block + 1  # blocks of a stage: its residual ones and what resamples, or one more going up
    attends = [kind.startswith("Cross") for kind in getattr(config, "up_block_types", ())]
    return (
        *RESNET,
        (r"^conv_in\b", "input_blocks.0.0"),
        (r"^time_embedding\.linear_(\d)", lambda i: f"time_embed.{2 * (i - 1)}"),
        (r"^add_embedding\.linear_(\d)", lambda i: f"label_emb.0.{2 * (i - 1)}"),
        (r"^class_embedding\b", "label_emb"),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"input_blocks.{1 + n * i + j}.0"),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"input_blocks.{1 + n * i + j}.1"),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\b", lambda i: f"input_blocks.{n * (i + 1)}.0.op"),
        (r"^mid_block\.resnets\.(\d)", lambda i: f"middle_block.{2 * i}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"output_blocks.{n * i + j}.0"),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"output_blocks.{n * i + j}.1"),
        (r"^up_blocks\.(\d+)\.upsamplers\.0", lambda i: f"output_blocks.{n * (i + 1) - 1}.{1 + attends[i]}"),
        (r"^conv_norm_out\b", "out.0"),
        (r"^conv_out\b", "out.2"),
        # ControlNet
        (r"^controlnet_down_blocks\.(\d+)\.", lambda i: f"zero_convs.{i}.0."),
        (r"^controlnet_mid_block\.", "middle_block_out.0."),
        (r"^controlnet_cond_embedding\.conv_in\b", "input_hint_block.0"),
        (r"^controlnet_cond_embedding\.blocks\.(\d+)", lambda i: f"input_hint_block.{2 * (i + 1)}"),
        (
            r"^controlnet_cond_embedding\.conv_out\b",
            lambda: f"input_hint_block.{4 * len(config.conditioning_embedding_out_channels) - 2}",
        ),
    )


def _autoencoder(config: Any) -> Rules:
    top = len(config.block_out_channels) - 1
    return (
        (r"\.mid_block\.resnets\.(\d)", lambda i: f".mid.block_{i + 1}"),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_(q|k|v)\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        (r"\.down_blocks\.(\d+)", r".down.\1"),
        (r"\.up_blocks\.(\d+)", lambda i: f".up.{top - i}"),
        (r"\.resnets\.", ".block."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )


RULES: dict[str, Callable[[Any], Rules]] = {
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _unet,
    "AutoencoderKL": _autoencoder,
    "CLIPTextModel": lambda config: OPEN_CLIP,
    "CLIPTextModelWithProjection": lambda config: OPEN_CLIP,
    "InceptionV3": lambda config: (),
}


def names(spec: Spec, current: Iterable[str]) -> dict[str, str]:
    """Today's names of parameters, as a diffusers file has them -> the original ones.

    >>> import flaxdiff
    >>> spec = flaxdiff.UNet2DConditionModel.from_config({})
    >>> names(spec, ["up_blocks.1.resnets.0.conv2.bias", "conv_out.weight"])
    {'up_blocks.1.resnets.0.conv2.bias': 'output_blocks.3.0.out_layers.3.bias', 'conv_out.weight': 'out.2.weight'}
    """
    rules = RULES[spec.module.__name__](spec.config)
    return {name: renamed(rules, name) for name in current}


def renamed(rules: Rules, name: str) -> str:
    """A name after every rule has been applied, in order."""
    for pattern, new in rules:
        name = re.sub(pattern, new if isinstance(new, str) else lambda m, new=new: new(*map(int, m.groups())), name)
    return name


def find(tensors: Tensors, name: str) -> Tensor | None:
    """The tensor of an original name, or the part of one that its ending says; None if it is not there.

    Raises:
      ValueError: a tensor that holds three does not divide, or has too few axes to transpose.
    """
    whole, third, transposed = re.fullmatch(r"(.*?)(?:\[(\d)\]|(\.T))?", name).groups()
    tensor = tensors.get(whole)
    if tensor is None or third is None and transposed is None:
        return tensor
    shape = tensor.shape
    if transposed and len(shape) != 2 or third and (not shape or shape[0] % 3):
        raise ValueError(f"{tensor.file.path}: {whole} is {list(shape)}, which is not what its name says.")
    strides = tensor.strides or tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if transposed:
        return dataclasses.replace(tensor, shape=shape[::-1], strides=strides[::-1])
    rows, size = shape[0] // 3, np.dtype(tensor.dtype).itemsize
    shape = (rows, *shape[1:])
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    start = tensor.offset + int(third) * rows * strides[0] * size
    return dataclasses.replace(tensor, offset=start, nbytes=reach * size, shape=shape, strides=strides, crc=None)
