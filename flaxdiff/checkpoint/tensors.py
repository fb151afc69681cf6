"""What a checkpoint file holds, before it is read: names, shapes, dtypes and where the bytes lie.

`Mapped` is a file in memory-mapped form; `Tensor` is one tensor in it. Nothing is read until `Tensor.view` is entered,
and the pages it touched are given back when it is left, so that a file of any size passes through little memory.
"""

import contextlib
import dataclasses
import math
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

BLOCK = 2**18  # elements looked at in one go: the block and its temporaries stay in cache

Tensors = Mapping[str, "Tensor"]  # name -> tensor, for a whole checkpoint


def damaged(path: Path, what: str) -> ValueError:
    """The error for a file whose bytes contradict each other."""
    return ValueError(f"{path}: {what}. The file is damaged or incomplete; download or write it again.")


class Mapped:
    """A file as bytes that are paged in when they are read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        with open(self.path, "rb") as f:
            self.size = f.seek(0, 2)
            if self.size == 0:
                raise damaged(self.path, "it is empty")
            self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def __getitem__(self, span: slice) -> bytes:
        return self._bytes[span]

    def array(self, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes from `offset` on, as a read-only view."""
        return np.frombuffer(self._bytes, np.uint8, nbytes, offset)

    def forget(self, offset: int, nbytes: int) -> None:
        """Take the pages of a span out of this process; they are read again if they are asked for."""
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_DONTNEED, start, min(offset + nbytes, self.size) - start)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      file: where it lies.
      offset, nbytes: which bytes; they have been checked against the size of the file.
      dtype: of the numbers, little-endian.
      shape: in the file's own layout.
      strides: in elements; None when the numbers lie in order.
      crc: the CRC-32 that the bytes should have, where the file records one.
    """

    file: "Mapped | Held | Unpacked"
    offset: int
    nbytes: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    crc: int | None = None

    def check(self) -> None:
        """Raise ValueError if the file records a checksum and the bytes do not have it."""
        if self.crc is None:
            return
        if zlib.crc32(self.file.array(self.offset, self.nbytes)) != self.crc:
            raise damaged(self.file.path, f"the {self.nbytes} bytes from {self.offset} on do not have their checksum")
        self.file.forget(self.offset, self.nbytes)

    @contextlib.contextmanager
    def view(self, checked: bool = True) -> Iterator[np.ndarray]:
        """The numbers, as a view of the file that is valid inside the `with` block.

        Without being `checked` first, which reads all of it, no more is read than is used.
        """
        if checked:
            self.check()
        numbers = self.file.array(self.offset, self.nbytes).view(self.dtype)
        if self.strides is None:
            numbers = numbers.reshape(self.shape)
        else:
            numbers = np.lib.stride_tricks.as_strided(
                numbers, self.shape, [s * self.dtype.itemsize for s in self.strides], writeable=False
            )
        try:
            yield numbers
        finally:
            self.file.forget(self.offset, self.nbytes)


class Held:
    """Numbers that are in memory, in the place of a file."""

    def __init__(self, numbers: np.ndarray, path: Path):
        self.path, self._bytes = path, np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)

    def array(self, offset: int, nbytes: int) -> np.ndarray:
        return self._bytes[offset : offset + nbytes]

    def forget(self, offset: int, nbytes: int) -> None:
        """They stay."""


def held(numbers: np.ndarray, path: Path) -> Tensor:
    """A tensor of numbers that were made of those of a file."""
    return Tensor(Held(numbers, path), 0, numbers.nbytes, numbers.dtype, numbers.shape)


class Unpacked:
    """Numbers that are worked out when they are asked for, in the place of a file.

    Args:
      path: of the file that they are worked out of.
      numbers: (first, last) -> those from the first on and before the last, float32.
    """

    def __init__(self, path: Path, numbers: Callable[[int, int], np.ndarray]):
        self.path, self.numbers = path, numbers

    def array(self, offset: int, nbytes: int) -> np.ndarray:
        first, last = offset // 4, -(-(offset + nbytes) // 4)
        found = np.ascontiguousarray(self.numbers(first, last), np.float32).reshape(-1).view(np.uint8)
        return found[offset - 4 * first :][:nbytes]

    def forget(self, offset: int, nbytes: int) -> None:
        """Nothing is kept."""


def unpacked_tensor(path: Path, shape: tuple[int, ...], numbers: Callable[[int, int], np.ndarray]) -> Tensor:
    """A tensor of float32 whose numbers are worked out when they are read, see `Unpacked`."""
    return Tensor(Unpacked(path, numbers), 0, 4 * math.prod(shape), np.dtype(np.float32), shape)


# --- numbers on the host --------------------------------------------------------------------------------------------


DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))  # what networks run in


def network_dtype(dtype: Any) -> np.dtype:
    """A dtype in any notation, once it is clear that parameters can have it.

    Raises:
      ValueError: they cannot.

    >>> network_dtype("bfloat16")
    dtype(bfloat16)
    """
    found = jax.numpy.dtype(dtype)
    if found not in DTYPES:
        raise ValueError(f"Parameters of dtype {found} are not supported; use one of {', '.join(map(str, DTYPES))}.")
    return found


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is a floating-point one, bfloat16 and the 8-bit ones included."""
    return np.issubdtype(dtype, np.floating) or dtype in _EXTENDED


_EXTENDED = {np.dtype(d) for d in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}


def buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose address suits XLA, so that on CPU it becomes a `jax.Array` without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target ← source, converted; a transposed source goes tile by tile, several times faster than row by row."""
    with np.errstate(over="ignore"):  # `finite` tells
        if source.ndim < 2 or source.flags.c_contiguous:
            np.copyto(target, source, casting="unsafe")
            return
        tile, (rows, columns) = 256, source.shape[-2:]
        for i in range(0, rows, tile):
            for j in range(0, columns, tile):
                part = np.s_[..., i : i + tile, j : j + tile]
                np.copyto(target[part], source[part], casting="unsafe")


def finite(a: np.ndarray) -> bool:
    """Whether a contiguous array of one of the dtypes that networks run in holds neither infinity nor NaN."""
    exponent = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00, np.dtype(np.float32): 0x7F800000}
    limit = exponent[a.dtype]
    kind = np.dtype(f"u{a.dtype.itemsize}")
    bits, magnitude = a.reshape(-1).view(kind), kind.type(2 ** (8 * kind.itemsize - 1) - 1)
    return all(int((bits[i : i + BLOCK] & magnitude).max()) < limit for i in range(0, bits.size, BLOCK))
