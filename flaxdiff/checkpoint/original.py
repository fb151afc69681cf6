"""What the original code bases (LDM, SGM, OpenCLIP) call the parameters that diffusers and transformers named anew.

One table of (regex, replacement) for each network turns today's name into the original one; every rule is applied, in
order. A single file is read by looking the original names up in it, and a LoRA trained on the original network is read
by the same table. Three endings say that a tensor is made of another: `name[2:3/3]` is the last third of its rows
(OpenCLIP keeps queries, keys and values in one), `name.swapped` has its halves in the other order, `name.T` is its
transpose.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from flaxdiff.checkpoint.tensors import Tensor, Tensors, held
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
    (r"\.self_attn\.q_proj\.(\w+)$", r".attn.in_proj_\1[0:1/3]"),
    (r"\.self_attn\.k_proj\.(\w+)$", r".attn.in_proj_\1[1:2/3]"),
    (r"\.self_attn\.v_proj\.(\w+)$", r".attn.in_proj_\1[2:3/3]"),
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


_QKV = (("q", "0:1"), ("k", "1:2"), ("v", "2:3"))
_DOUBLE, _SINGLE = r"^(double_blocks\.\d+)\.", r"^(single_blocks\.\d+)\."
FLUX: Rules = (
    (r"^time_text_embed\.timestep_embedder\b", "time_in"),
    (r"^time_text_embed\.guidance_embedder\b", "guidance_in"),
    (r"^time_text_embed\.text_embedder\b", "vector_in"),
    (r"^(\w+_in)\.linear_1\b", r"\1.in_layer"),
    (r"^(\w+_in)\.linear_2\b", r"\1.out_layer"),
    (r"^context_embedder\b", "txt_in"),
    (r"^x_embedder\b", "img_in"),
    (r"^norm_out\.linear\.(\w+)$", r"final_layer.adaLN_modulation.1.\1.swapped"),
    (r"^proj_out\b", "final_layer.linear"),
    (r"^transformer_blocks\b", "double_blocks"),
    (r"^single_transformer_blocks\b", "single_blocks"),
    (rf"{_DOUBLE}norm1\.linear\b", r"\1.img_mod.lin"),
    (rf"{_DOUBLE}norm1_context\.linear\b", r"\1.txt_mod.lin"),
    *((rf"{_DOUBLE}attn\.to_{x}\.(\w+)$", rf"\1.img_attn.qkv.\2[{part}/3]") for x, part in _QKV),
    *((rf"{_DOUBLE}attn\.add_{x}_proj\.(\w+)$", rf"\1.txt_attn.qkv.\2[{part}/3]") for x, part in _QKV),
    (rf"{_DOUBLE}attn\.to_out\.0\b", r"\1.img_attn.proj"),
    (rf"{_DOUBLE}attn\.to_add_out\b", r"\1.txt_attn.proj"),
    (rf"{_DOUBLE}attn\.norm_added_", r"\1.txt_attn.norm."),
    (rf"{_DOUBLE}attn\.norm_", r"\1.img_attn.norm."),
    (r"\.ff\.net\.(\d)(?:\.proj)?\b", r".img_mlp.\1"),
    (r"\.ff_context\.net\.(\d)(?:\.proj)?\b", r".txt_mlp.\1"),
    (rf"{_SINGLE}norm\.linear\b", r"\1.modulation.lin"),
    *((rf"{_SINGLE}attn\.to_{x}\.(\w+)$", rf"\1.linear1.\2[{part}/7]") for x, part in _QKV),
    (rf"{_SINGLE}proj_mlp\.(\w+)$", r"\1.linear1.\2[3:7/7]"),
    (rf"{_SINGLE}proj_out\b", r"\1.linear2"),
    (rf"{_SINGLE}attn\.norm_", r"\1.norm."),
    (r"\.norm\.q\.weight$", ".norm.query_norm.scale"),
    (r"\.norm\.k\.weight$", ".norm.key_norm.scale"),
)


def _sd3(config: Any) -> Rules:
    last = rf"^transformer_blocks\.{config.num_layers - 1}"
    return (
        (r"^pos_embed\.pos_embed$", "pos_embed"),
        (r"^pos_embed\.proj\b", "x_embedder.proj"),
        (r"^time_text_embed\.timestep_embedder\.linear_(\d)", lambda i: f"t_embedder.mlp.{2 * (i - 1)}"),
        (r"^time_text_embed\.text_embedder\.linear_(\d)", lambda i: f"y_embedder.mlp.{2 * (i - 1)}"),
        (r"^norm_out\.linear\.(\w+)$", r"final_layer.adaLN_modulation.1.\1.swapped"),
        (r"^proj_out\b", "final_layer.linear"),
        (rf"({last}\.norm1_context\.linear\.\w+)$", r"\1.swapped"),  # where nothing is gated
        (r"\.norm1\.linear\b", ".x_block.adaLN_modulation.1"),
        (r"\.norm1_context\.linear\b", ".context_block.adaLN_modulation.1"),
        *((rf"\.(attn2?)\.to_{x}\.(\w+)$", rf".x_block.\1.qkv.\2[{part}/3]") for x, part in _QKV),
        *((rf"\.attn\.add_{x}_proj\.(\w+)$", rf".context_block.attn.qkv.\1[{part}/3]") for x, part in _QKV),
        (r"\.(attn2?)\.norm_([qk])\b", r".x_block.\1.ln_\2"),
        (r"\.attn\.norm_added_([qk])\b", r".context_block.attn.ln_\1"),
        (r"\.(attn2?)\.to_out\.0\b", r".x_block.\1.proj"),
        (r"\.attn\.to_add_out\b", ".context_block.attn.proj"),
        (r"\.ff\.net\.0\.proj\b", ".x_block.mlp.fc1"),
        (r"\.ff\.net\.2\b", ".x_block.mlp.fc2"),
        (r"\.ff_context\.net\.0\.proj\b", ".context_block.mlp.fc1"),
        (r"\.ff_context\.net\.2\b", ".context_block.mlp.fc2"),
        (r"^transformer_blocks\.", "joint_blocks."),
    )


RULES: dict[str, Callable[[Any], Rules]] = {
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _unet,
    "AutoencoderKL": _autoencoder,
    "FluxTransformer2DModel": lambda config: FLUX,
    "CLIPTextModel": lambda config: OPEN_CLIP,
    "CLIPTextModelWithProjection": lambda config: OPEN_CLIP,
    "SD3Transformer2DModel": _sd3,
    "T5EncoderModel": lambda config: (),
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


PART = re.compile(r"(.*?)(\[(\d+):(\d+)/(\d+)\]|\.swapped|\.T)?")


def whole(name: str) -> str:
    """The name of the tensor that a name with an ending is made of.

    >>> whole("attn.in_proj_weight[0:1/3]")
    'attn.in_proj_weight'
    """
    return PART.fullmatch(name)[1]


def rows(name: str, count: int) -> np.ndarray | None:
    """Which of the `count` rows of a tensor a name with an ending stands for; None for all of them in their order.

    Raises:
      ValueError: they do not divide into such parts.

    >>> rows("qkv[1:2/3]", 6), rows("lin.swapped", 4)
    (array([2, 3]), array([2, 3, 0, 1]))
    """
    _, ending, first, last, parts = PART.fullmatch(name).groups()
    if ending in (None, ".T"):
        return None
    parts = int(parts or 2)
    if not count or count % parts:
        raise ValueError(f"{whole(name)} has {count} rows, which are no {parts} equal parts.")
    if first is None:
        return np.roll(np.arange(count), count // 2)
    return np.arange(int(first) * count // parts, int(last) * count // parts)


def find(tensors: Tensors, name: str) -> Tensor | None:
    """The tensor of an original name, or what its ending makes of it; None if it is not there.

    Raises:
      ValueError: a tensor that holds several does not divide, or has too few axes to transpose.
    """
    tensor = tensors.get(whole(name))
    if tensor is None or whole(name) == name:
        return tensor
    shape, turned = tensor.shape, name.endswith(".T")
    if len(shape) < 1 + turned:
        raise ValueError(f"{tensor.file.path}: {whole(name)} is {list(shape)}, which is not what its name says.")
    strides = tensor.strides or tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if turned:
        return dataclasses.replace(tensor, shape=shape[::-1], strides=strides[::-1])
    try:
        chosen = rows(name, shape[0])
    except ValueError as fault:
        raise ValueError(f"{tensor.file.path}: {fault}") from None
    if (np.diff(chosen) != 1).any():
        with tensor.view() as numbers:
            return held(numbers[chosen], tensor.file.path)
    shape, size = (len(chosen), *shape[1:]), np.dtype(tensor.dtype).itemsize
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    start = tensor.offset + int(chosen[0]) * strides[0] * size
    return dataclasses.replace(tensor, offset=start, nbytes=reach * size, shape=shape, strides=strides, crc=None)
