"""The safetensors format: a length, a JSON header, and the numbers.

Reading takes nothing on trust: lengths, offsets, shapes and dtypes must agree with each other and with the size of the
file, and the numbers must fill it without a gap or an overlap. Writing adds what the format lacks, a CRC-32 of each
tensor (in the header's metadata, which other readers pass over), so that a flipped bit in a file written here is found.
Of a file without them only this can be said: a parameter with infinities or NaNs is refused when it is read.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flaxdiff.checkpoint.tensors import Mapped, Tensor, damaged

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # the format's own bound
CHECKSUMS = "crc32"  # our key in the metadata: JSON of name -> checksum


def read(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds; no number is read yet.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the header and the file do not agree; names the file, what is wrong and the remedy.
    """
    file = Mapped(path)
    length = int.from_bytes(file[:8], "little")
    if file.size < 8 or length > min(LARGEST_HEADER, file.size - 8):
        raise damaged(path, f"its header would take {length:,} bytes, the file has {file.size:,}")
    start = 8 + length
    try:
        header = json.loads(file[8:start].decode(), object_pairs_hook=_unique)
        notes = header.pop("__metadata__", {})
        checksums = json.loads(notes.get(CHECKSUMS, "{}"))
        tensors = {name: _tensor(file, start, name, entry, checksums) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise damaged(path, f"its header does not describe tensors ({error})") from error
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise damaged(
                path, f"{name!r} begins at byte {tensor.offset - start:,} of the data, not at {end - start:,}"
            )
        end += tensor.nbytes
    if end != file.size:
        raise damaged(path, f"the header describes {end:,} bytes, the file has {file.size:,}")
    return tensors


def notes(path: Path) -> dict[str, str]:
    """The metadata that the writer of a safetensors file, already checked by `read`, left in its header."""
    file = Mapped(path)
    found = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")].decode()).get("__metadata__", {})
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def _tensor(file: Mapped, start: int, name: str, entry: Mapping[str, Any], checksums: Mapping[str, int]) -> Tensor:
    dtype, shape, (begin, end) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name!r} has shape {shape} and lies at {begin}..{end}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} of shape {shape} and dtype {entry['dtype']} takes {end - begin} bytes")
    return Tensor(file, start + begin, end - begin, dtype, tuple(shape), crc=checksums.get(name))


def write(path: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], arrays: Iterable[np.ndarray]) -> None:
    """Write tensors one after another; only one needs to be in memory at a time.

    Args:
      path: the file; it is complete on disk when this returns.
      shapes: name -> (shape, dtype), in the order of `arrays`.
      arrays: the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what PyTorch's readers ask for
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    checksums = dict.fromkeys(shapes, 2**32 - 1)  # ten digits each, until the numbers have been seen
    room = len(_header(header, checksums, 0))
    with open(path, "wb") as f:
        f.write(_header(header, checksums, room))
        for name, array in zip(shapes, arrays, strict=True):
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            checksums[name] = zlib.crc32(raw)
            f.write(raw)
        f.seek(0)
        f.write(_header(header, checksums, room))
        f.flush()
        os.fsync(f.fileno())


def _header(header: dict[str, Any], checksums: Mapping[str, int], size: int) -> bytes:
    """Length and header, padded with spaces to at least `size` and to a multiple of eight."""
    notes = header["__metadata__"] | {CHECKSUMS: json.dumps(checksums)}
    text = json.dumps(header | {"__metadata__": notes}).encode()
    text = text.ljust(max(size - 8, -(-len(text) // 8) * 8))
    return len(text).to_bytes(8, "little") + text
