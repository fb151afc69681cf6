"""Weights that bitsandbytes has packed: of four bits with tables, and of eight with a scale a row.

A packed weight lies in a file as several tensors. Here they are one again, of float32, whose numbers are unpacked when
they are read; `flaxdiff.quantize` packs them in kinds that run.

Reference: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022; QLoRA: Efficient
Finetuning of Quantized LLMs, 2023.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxdiff.checkpoint.tensors import Tensor, damaged

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class Unpacked:
    """Numbers that are worked out when they are asked for, in the place of a file."""

    def __init__(self, path: Path, numbers: Callable[[], np.ndarray]):
        self.path, self.numbers = path, numbers

    def array(self, offset: int, nbytes: int) -> np.ndarray:
        """The bytes of some of them."""
        return np.ascontiguousarray(self.numbers(), np.float32).reshape(-1).view(np.uint8)[offset : offset + nbytes]

    def forget(self, offset: int, nbytes: int) -> None:
        """Nothing is kept."""


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
    return found


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

    found[name] = _tensor(path, shape, numbers)


def _eight_bits(found: dict[str, Tensor], prefix: str) -> None:
    """Whole numbers, of which 127 stands for the largest of a row."""
    scale, packed = found.pop(f"{prefix}SCB"), found.get(f"{prefix}weight")
    found.pop(f"{prefix}weight_format", None)
    if packed is None or len(packed.shape) != 2 or scale.shape != packed.shape[:1]:
        raise damaged(scale.file.path, f"{prefix}SCB has shape {scale.shape}, and no weight with as many rows")
    numbers = lambda: _numbers(packed).astype(np.float32) * (_numbers(scale)[:, None].astype(np.float32) / 127)
    found[f"{prefix}weight"] = _tensor(packed.file.path, packed.shape, numbers)


def _tensor(path: Path, shape: tuple[int, ...], numbers: Callable[[], Any]) -> Tensor:
    return Tensor(Unpacked(path, numbers), 0, 4 * math.prod(shape), np.dtype(np.float32), shape)
