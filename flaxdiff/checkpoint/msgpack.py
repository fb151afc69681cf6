"""Flax checkpoints (`diffusion_flax_model.msgpack`, `flax_model.msgpack`), read as if PyTorch had written them.

Such a file is one msgpack map of maps whose leaves are arrays, under the names that Flax's modules gave them. The names
differ from PyTorch's by the rules of `RENAMES`, and kernels have their axes the other way round. `read` walks over the
file without copying a number: a tensor that it returns has PyTorch's name, and PyTorch's shape through its strides, so
that everything above treats it like one of a safetensors file. Only what Flax writes is understood (save for arrays
beyond a gigabyte, which it cuts in pieces and no model here has); all else is an error, and lengths, shapes and dtypes
must agree with each other and with the size of the file.
"""

import math
import re
from pathlib import Path

import numpy as np

from flaxdiff.checkpoint import safetensors
from flaxdiff.checkpoint.tensors import Mapped, Tensor, damaged

# Flax's names, joined by dots -> PyTorch's: (regex, replacement). Entries of a list have their number in their name,
# and what a layer multiplies by is called after the layer. `convert` does the rest, as for PyTorch's older files.
RENAMES = (
    (r"\b(\w*blocks|resnets|attentions|downsamplers|upsamplers|net|to_out)_(\d+)\.", r"\1.\2."),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)
DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in safetensors.DTYPES.values()}
ARRAY = 1  # Flax's number for the extension type that holds an array
DEEPEST = 32  # maps within maps

# What begins with which byte: (first, last, kind, bytes that hold the length, or an int's value); with none of those
# the length lies in the byte itself, counted from `first`.
HEADS = (
    (0x00, 0x7F, "int", 0),
    (0x80, 0x8F, "map", 0),
    (0x90, 0x9F, "array", 0),
    (0xA0, 0xBF, "str", 0),
    *((0xC4 + i, 0xC4 + i, "bin", 1 << i) for i in range(3)),
    *((0xC7 + i, 0xC7 + i, "ext", 1 << i) for i in range(3)),
    *((0xCC + i, 0xCC + i, "int", 1 << i) for i in range(4)),
    (0xD4, 0xD8, "fixext", 0),
    *((0xD9 + i, 0xD9 + i, "str", 1 << i) for i in range(3)),
    *((0xDC + i, 0xDC + i, "array", 2 << i) for i in range(2)),
    *((0xDE + i, 0xDE + i, "map", 2 << i) for i in range(2)),
)


def read(path: Path) -> dict[str, Tensor]:
    """What a Flax file holds, under PyTorch's names; no number is read yet.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is cut short, or is not a msgpack file of arrays as Flax writes it.
    """
    walk = _Walk(Mapped(path))
    tensors: dict[str, Tensor] = {}
    try:
        _tree(walk, walk.expect("map"), (), tensors)
        if walk.at != walk.file.size:
            raise ValueError(f"it ends at byte {walk.at:,} of {walk.file.size:,}")
    except ValueError as error:
        raise damaged(path, f"it is not a Flax file of arrays ({error})") from error
    return tensors


def torch_name(flax_name: str) -> str:
    """What PyTorch calls a parameter of a Flax module.

    >>> torch_name("down_blocks_0.attentions_1.transformer_blocks_0.attn1.to_out_0.kernel")
    'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight'
    >>> torch_name("time_embedding.linear_1.kernel")
    'time_embedding.linear_1.weight'
    """
    for pattern, replacement in RENAMES:
        flax_name = re.sub(pattern, replacement, flax_name)
    return flax_name


class _Walk:
    """Goes over a file from its beginning; whatever it steps over lies in the file. Raises ValueError otherwise."""

    def __init__(self, file: Mapped):
        self.file, self.at = file, 0

    def take(self, n: int) -> int:
        """Step over n bytes; returns where they begin."""
        start = self.at
        if n > self.file.size - start:
            raise ValueError(f"it ends at byte {self.file.size:,}, and something in it at byte {start + n:,}")
        self.at += n
        return start

    def number(self, width: int) -> int:
        start = self.take(width)
        return int.from_bytes(self.file[start : self.at], "big")

    def head(self) -> tuple[str, int]:
        """The kind of the value that begins here, and its length; of an int, its value."""
        byte = self.number(1)
        for first, last, kind, width in HEADS:
            if first <= byte <= last:
                n = self.number(width) if width else byte - first
                return ("ext", 1 << n) if kind == "fixext" else (kind, n)
        raise ValueError(f"a value that begins with {byte:#04x} at byte {self.at - 1:,}")

    def expect(self, kind: str) -> int:
        """The length of the value that begins here, once it is clear what it is."""
        found, n = self.head()
        if found != kind:
            raise ValueError(f"{found} where {kind} should be, before byte {self.at:,}")
        return n

    def text(self) -> str:
        start = self.take(self.expect("str"))
        return self.file[start : self.at].decode()


def _tree(walk: _Walk, entries: int, path: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
    """Add the arrays of a map of so many entries, which begin here."""
    if len(path) > DEEPEST:
        raise ValueError(f"maps within maps, more than {DEEPEST} deep")
    for _ in range(entries):
        inner = (*path, walk.text())
        name = ".".join(inner)
        kind, n = walk.head()
        if kind == "map":
            _tree(walk, n, inner, tensors)
        elif kind == "ext" and walk.number(1) == ARRAY:
            ours = torch_name(name)
            if ours in tensors:
                raise ValueError(f"{name} comes twice")
            tensors[ours] = _tensor(walk, name, n)
        else:
            raise ValueError(f"{name} is neither an array nor a map")


def _tensor(walk: _Walk, name: str, size: int) -> Tensor:
    """The array in the `size` bytes that begin here: its shape, the name of its dtype, and its numbers."""
    end = walk.at + size
    if walk.expect("array") != 3:
        raise ValueError(f"{name} is not made of shape, dtype and numbers")
    shape = tuple(walk.expect("int") for _ in range(min(walk.expect("array"), 33)))
    dtype = DTYPES.get(found := walk.text())
    if dtype is None:
        raise ValueError(f"{name} is of dtype {found[:20]!r}")
    nbytes = walk.expect("bin")
    offset = walk.take(nbytes)
    if walk.at != end or nbytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} and dtype {dtype} has {nbytes:,} bytes in an entry of {size:,}")
    axes = tuple(range(len(shape)))
    if name.endswith(".kernel"):  # [..., in, out] -> [out, in, ...]
        axes = axes[:-3:-1] + axes[:-2]
    strides = tuple(math.prod(shape[i + 1 :]) for i in axes)
    return Tensor(walk.file, offset, nbytes, dtype, tuple(shape[i] for i in axes), strides)
