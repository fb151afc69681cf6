"""Weights that lie in a file as several tensors: those of bitsandbytes, of four bits with tables and of eight with a
scale a row, and those of eight bits in floating point with a scale, as ComfyUI keeps them.

Here they are one again, of float32, whose numbers are unpacked when they are read; `flaxdiff.quantize` packs them in
kinds that run.

Reference: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022; QLoRA: Efficient
Finetuning of Quantized LLMs, 2023.
"""

import json
import math
import re
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from flaxdiff.checkpoint.tensors import Tensor, damaged, unpacked_tensor

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
SCALED = re.compile(r"(.+\.)(?:scale_weight|weight_scale)")  # of older files, and of newer ones
BESIDE = "scale_input", "input_scale", "comfy_quant"  # which say how to compute, not what the weight is
FLOATS = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
MARK = "scaled_fp8"  # of files that have such weights
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, those that belong together as one.

    Raises:
      ValueError: a part is missing, or the parts do not agree.
    """
    found = dict(tensors)
    for name in tensors:
        if state := STATE.fullmatch(name):
            _four_bits(found, state[1], name)
        elif name.endswith(".SCB"):
            _eight_bits(found, name.removesuffix("SCB"))
        elif scaled := SCALED.fullmatch(name):
            _floats(found, scaled[1], name)
    return {name: tensor for name, tensor in found.items() if name.split(".")[-1] != MARK}


def _numbers(tensor: Tensor) -> np.ndarray:
    with tensor.view() as view:
        return np.array(view)


def _four_bits(found: dict[str, Tensor], name: str, state: str) -> None:
    """Two in a byte, the upper half first: places in a table, times the largest of their block."""
    path = found[state].file.path
    try:
        said = json.loads(bytes(_numbers(found.pop(state))))
        packed, parts = found[name], {part: found.pop(f"{name}.{part}", None) for part in PARTS}
        shape, block = tuple(map(int, said["shape"])), int(said["blocksize"])
        blocks = -(-math.prod(shape) // block)
        wanted = math.prod(packed.shape) * 2, parts["absmax"].shape, parts["quant_map"].shape
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise damaged(path, f"what is said of the packed weight {name!r} is not complete ({error})") from error
    if wanted != (math.prod(shape) + math.prod(shape) % 2, (blocks,), (16,)) or min(shape, default=0) < 1:
        raise damaged(path, f"the parts of the packed weight {name!r} of shape {shape} do not agree")

    def largest() -> np.ndarray:
        coded = _numbers(parts["absmax"])
        if parts["nested_absmax"] is None:
            return coded
        each = np.repeat(_numbers(parts["nested_absmax"]), int(said["nested_blocksize"]))[: len(coded)]
        return _numbers(parts["nested_quant_map"])[coded] * each + np.float32(said["nested_offset"])

    def numbers() -> np.ndarray:
        pairs = _numbers(packed).reshape(-1)
        places = np.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[: math.prod(shape)]
        return _numbers(parts["quant_map"])[places] * np.repeat(largest(), block)[: len(places)]

    found[name] = unpacked_tensor(path, shape, lambda first, last: numbers()[first:last])


def _eight_bits(found: dict[str, Tensor], prefix: str) -> None:
    """Whole numbers, of which 127 stands for the largest of a row."""
    scale, packed = found.pop(f"{prefix}SCB"), found.get(f"{prefix}weight")
    found.pop(f"{prefix}weight_format", None)
    if packed is None or len(packed.shape) != 2 or scale.shape != packed.shape[:1]:
        raise damaged(scale.file.path, f"{prefix}SCB has shape {scale.shape}, and no weight with as many rows")
    _scaled(found, f"{prefix}weight", lambda: _numbers(scale).astype(np.float32) / 127)


def _floats(found: dict[str, Tensor], prefix: str, name: str) -> None:
    """Floating point of eight bits, times a scale for all or one for each row."""
    scale, packed = found.pop(name), found.get(f"{prefix}weight")
    said = [found.pop(f"{prefix}{part}", None) for part in BESIDE]
    if packed is None or packed.dtype not in FLOATS:
        there = "no such weight" if packed is None else f"one of {packed.dtype}"
        how = "" if said[-1] is None else f" ({bytes(_numbers(said[-1]))[:80].decode(errors='replace')})"
        raise ValueError(
            f"{scale.file.path}: {name} scales {there}{how}; known are weights of {' and '.join(map(str, FLOATS))}."
        )
    if math.prod(scale.shape) not in (1, *packed.shape[:1]) or math.prod(scale.shape) != max((1, *scale.shape)):
        raise damaged(scale.file.path, f"{name} has shape {scale.shape} for a weight of shape {packed.shape}")
    _scaled(found, f"{prefix}weight", lambda: _numbers(scale).astype(np.float32).reshape(-1))


def _scaled(found: dict[str, Tensor], name: str, scale: Callable[[], np.ndarray]) -> None:
    """Numbers of few bits, times a scale for each row [rows], or for all [1]."""
    packed = found[name]
    if min(packed.shape, default=0) < 1:
        raise damaged(packed.file.path, f"the packed weight {name!r} has shape {packed.shape}")

    def numbers(first: int, last: int) -> np.ndarray:
        with packed.view() as view:
            rows = view.reshape(len(view), -1)
            above, below = first // rows.shape[1], -(-last // rows.shape[1])  # the rows that are asked for
            factor = scale()
            part = rows[above:below].astype(np.float32) * (factor if len(factor) == 1 else factor[above:below, None])
        skip = above * rows.shape[1]
        return part.reshape(-1)[first - skip : last - skip]

    found[name] = unpacked_tensor(packed.file.path, packed.shape, numbers)
