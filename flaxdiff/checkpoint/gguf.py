"""The GGUF format: metadata, descriptions of tensors, and numbers of two to eight bits in blocks that share scales.

Numbers are unpacked when they are read, block by block to float32; what a network makes of them is up to its dtype, and
`flaxdiff.quantize` packs them again in kinds that run. As everywhere nothing is taken on trust: counts, lengths, shapes
and offsets must fit the file.

Reference: ggml, docs/gguf.md.
"""

import functools
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flaxdiff.checkpoint.tensors import Mapped, Tensor, damaged, unpacked_tensor

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = "general.alignment"  # the key of a metadatum, by default 32
SHAPE = "comfy.gguf.orig_shape."  # and the name of a tensor whose rows were cut up to be packed: the shape it had
MOST = 1 << 20  # entries of any list, and bytes of a name


class Kind(NamedTuple):
    """How numbers are packed: so many of them in so many bytes, and bytes [N, size] -> float32 [N, count]."""

    name: str
    count: int
    size: int
    unpack: Callable[[np.ndarray], np.ndarray]


# --- blocks ----------------------------------------------------------------------------------------------------------


def half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of each block, [N, 1] in float32."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def bits(a: np.ndarray, width: int, shifts: range) -> np.ndarray:
    """Numbers of so many bits out of bytes [N, K], one for each shift: [N, shifts, K]."""
    return (a[:, None, :] >> np.array(shifts, np.uint8)[:, None]) & ((1 << width) - 1)


def nibbles(a: np.ndarray) -> np.ndarray:
    """The lower halves of bytes [N, K], then the upper ones: [N, 2 K]."""
    return bits(a, 4, range(0, 8, 4)).reshape(len(a), -1)


def _simple(width: int, offset: bool, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """32 numbers with a scale; signed, or with an offset; of 5 bits the highest lie apart."""

    def unpack(blocks: np.ndarray) -> np.ndarray:
        at = 4 if offset else 2
        if width == 8:
            return half(blocks, 0) * blocks[:, at:].view(np.int8)
        q = nibbles(blocks[:, size - 16 :]).astype(np.int32)
        if width == 5:
            q |= np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little").astype(np.int32) << 4
        q = (q if offset else q - (1 << width - 1)).astype(np.float32)
        return half(blocks, 0) * q + (half(blocks, 2) if offset else 0)

    return unpack


def _scaled(q: np.ndarray, scale: np.ndarray, less: np.ndarray | None = None) -> np.ndarray:
    """256 numbers, of which equal shares have a scale [N, K] and perhaps something to subtract each."""
    parts = q.reshape(*scale.shape, -1).astype(np.float32) * scale[..., None]
    return (parts if less is None else parts - less[..., None]).reshape(len(q), -1)


def _pairs(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight offsets of six bits out of twelve bytes [N, 12]."""
    low, high, last = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    scale = np.concatenate([low & 63, (last & 15) | (low >> 6 << 4)], 1)
    return scale, np.concatenate([high & 63, (last >> 4) | (high >> 6 << 4)], 1)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scales, q = blocks[:, :16], _quarters(blocks[:, 16:80])
    return _scaled(q, half(blocks, 80) * (scales & 15), half(blocks, 82) * (scales >> 4))


def _quarters(a: np.ndarray) -> np.ndarray:
    """Four numbers of two bits in each of 64 bytes, 32 bytes at a time: [N, 256]."""
    return np.concatenate([bits(part, 2, range(0, 8, 2)) for part in np.split(a, 2, 1)], 1).reshape(len(a), -1)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    top = bits(blocks[:, :32], 1, range(8)).reshape(len(blocks), -1).astype(np.int32)
    q = _quarters(blocks[:, 32:96]) - 4 * (1 - top)
    scale = nibbles(blocks[:, 96:104]) | bits(blocks[:, 104:108], 2, range(0, 8, 2)).reshape(len(blocks), -1) << 4
    return _scaled(q, half(blocks, 108) * (scale.astype(np.int8) - 32))


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _of_eight(blocks, np.concatenate([nibbles(part) for part in np.split(blocks[:, 16:], 4, 1)], 1))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    q = np.concatenate([nibbles(part) for part in np.split(blocks[:, 48:], 4, 1)], 1)
    return _of_eight(blocks, q | bits(blocks[:, 16:48], 1, range(8)).reshape(q.shape) << 4)


def _of_eight(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    scale, less = _pairs(blocks[:, 4:16])
    return _scaled(q, half(blocks, 0) * scale, half(blocks, 2) * less)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = np.concatenate([nibbles(part) for part in np.split(blocks[:, :128], 2, 1)], 1)
    top = _quarters(blocks[:, 128:192])
    return _scaled((low | top << 4).astype(np.int32) - 32, half(blocks, 208) * blocks[:, 192:208].view(np.int8))


def _plain(dtype: Any) -> Kind:
    size = np.dtype(dtype).itemsize
    return Kind(np.dtype(dtype).name, 1, size, lambda blocks: blocks.view(dtype).astype(np.float32))


KINDS = {
    0: _plain(np.float32),
    1: _plain(np.float16),
    2: Kind("Q4_0", 32, 18, _simple(4, False, 18)),
    3: Kind("Q4_1", 32, 20, _simple(4, True, 20)),
    6: Kind("Q5_0", 32, 22, _simple(5, False, 22)),
    7: Kind("Q5_1", 32, 24, _simple(5, True, 24)),
    8: Kind("Q8_0", 32, 34, _simple(8, False, 34)),
    10: Kind("Q2_K", 256, 84, _q2_k),
    11: Kind("Q3_K", 256, 110, _q3_k),
    12: Kind("Q4_K", 256, 144, _q4_k),
    13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
    30: _plain(ml_dtypes.bfloat16),
}


def numbers(file: Mapped, start: int, kind: Kind, first: int, last: int) -> np.ndarray:
    """The numbers from the first on and before the last of those whose blocks begin at a byte of the file."""
    above, below = first // kind.count, -(-last // kind.count)  # the blocks that are asked for
    span = start + above * kind.size, (below - above) * kind.size
    found = kind.unpack(file.array(*span).reshape(-1, kind.size)).reshape(-1)
    file.forget(*span)
    return found[first - above * kind.count : last - above * kind.count]


# --- the file --------------------------------------------------------------------------------------------------------


class _Walk:
    """A place in the header, read from front to back."""

    def __init__(self, file: Mapped):
        self.file, self.at = file, 0

    def take(self, size: int) -> bytes:
        if not 0 <= size <= self.file.size - self.at:
            raise damaged(self.file.path, f"its header would go on for {size:,} bytes from {self.at:,}")
        self.at += size
        return self.file[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self) -> int:
        if (n := self.number("Q")) > MOST:
            raise damaged(self.file.path, f"it lists {n:,} entries, and no file has more than {MOST:,}")
        return n

    def text(self) -> str:
        return self.take(self.count()).decode(errors="replace")

    def value(self, sort: int, nested: bool = False) -> Any:
        """A metadatum of a sort; what long lists hold is passed over."""
        if sort == TEXT:
            return self.text()
        if sort == LIST and not nested:
            of, n = self.number("I"), self.count()
            if of in NUMBERS and n > 8:
                self.take(n * struct.calcsize(NUMBERS[of]))
                return ()
            held = [self.value(of, nested=True) for _ in range(n)]
            return tuple(held[:8])
        if sort not in NUMBERS:
            raise damaged(self.file.path, f"it has metadata of the unknown sort {sort}")
        return self.number(NUMBERS[sort])


TEXT, LIST = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read(path: Path) -> dict[str, Tensor]:
    """What a GGUF file holds, as float32; no number is read yet.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is none, or damaged, or packed in a way that is not known here.
    """
    file = Mapped(path)
    walk = _Walk(file)
    if walk.take(4) != MAGIC or walk.number("I") not in VERSIONS:
        raise ValueError(f"{path} is no GGUF file of version 2 or 3; give one, or a .safetensors file.")
    tensors, data = walk.count(), walk.count()
    said = {}
    for _ in range(data):
        key, sort = walk.text(), walk.number("I")
        said[key] = walk.value(sort)
    described = [_description(walk, path) for _ in range(tensors)]
    alignment = said.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise damaged(path, f"its {ALIGNMENT} is {alignment!r}")
    start, found = -(-walk.at // alignment) * alignment, {}
    for name, shape, kind, offset in described:
        blocks = math.prod(shape) // kind.count
        if (shape[-1] if shape else 1) % kind.count or start + offset + blocks * kind.size > file.size or name in found:
            raise damaged(path, f"{name!r} of shape {shape}, {kind.name} at {offset:,}, does not fit")
        was = said.get(SHAPE + name)
        if isinstance(was, tuple) and all(isinstance(n, int) and n > 0 for n in was):
            shape = was if math.prod(was) == math.prod(shape) else shape
        found[name] = unpacked_tensor(path, shape, functools.partial(numbers, file, start + offset, kind))
    return found


def _description(walk: _Walk, path: Path) -> tuple[str, tuple[int, ...], Kind, int]:
    name, axes = walk.text(), walk.number("I")
    if axes > 8:
        raise damaged(path, f"{name!r} has {axes} axes")
    shape = tuple(walk.number("Q") for _ in range(axes))[::-1]  # the innermost comes first there
    kind, offset = walk.number("I"), walk.number("Q")
    if kind not in KINDS:
        known = ", ".join(k.name for k in KINDS.values())
        raise ValueError(f"{path}: {name!r} is packed as number {kind}, which is not known here; known are {known}.")
    return name, shape, KINDS[kind], offset
