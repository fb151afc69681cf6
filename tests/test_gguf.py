"""GGUF files against the gguf package: every way to pack, and what is wrong with a file."""

import struct

import gguf
import numpy as np
import pytest

from flaxdiff.checkpoint import gguf as ours

rng = np.random.default_rng(0)
TYPES = {number: gguf.GGMLQuantizationType(number) for number in ours.KINDS}
PACKED = [number for number, kind in ours.KINDS.items() if kind.count > 1]


def blocks(number: int, n: int) -> np.ndarray:
    """Random blocks whose float16 scales are neither infinite nor NaN."""
    kind = ours.KINDS[number]
    made = rng.integers(0, 256, (n, kind.size), np.uint8)
    for at in {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 10: [80, 82], 11: [108], 14: [208]}.get(number, [0, 2]):
        made[:, at : at + 2] = rng.standard_normal((n, 1)).astype(np.float16).view(np.uint8)
    return made


@pytest.mark.parametrize("number", PACKED, ids=lambda n: ours.KINDS[n].name)
def test_blocks(number):
    made = blocks(number, 7)
    theirs = gguf.quants.dequantize(made, TYPES[number])
    unpacked = ours.KINDS[number].unpack(made)
    assert unpacked.dtype == np.float32
    np.testing.assert_allclose(unpacked, theirs, rtol=1e-6, atol=1e-6)
    assert gguf.GGML_QUANT_SIZES[TYPES[number]] == ours.KINDS[number][1:3]


def write(path, tensors, **data):
    """A file with arrays, or blocks [rows, bytes] of a kind."""
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("list", list(range(20)))
    writer.add_array("comfy.gguf.orig_shape.Q8_0", [4, 3, 4, 4])
    for key, value in data.items():
        writer.add_uint32(key, value)
    for name, (array, number) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=None if number is None else TYPES[number])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def test_file(tmp_path):
    """Plain and packed tensors in their places, whole or a part of one."""
    plain, halves = rng.standard_normal((3, 5)).astype(np.float32), rng.standard_normal((2, 4)).astype(np.float16)
    packed = {ours.KINDS[n].name: (blocks(n, 6).reshape(2, -1), n) for n in PACKED}
    write(tmp_path / "a.gguf", {"plain": (plain, None), "halves": (halves, None), **packed})
    found = ours.read(tmp_path / "a.gguf")
    assert found["plain"].shape == (3, 5) and found["Q4_K"].shape == (2, 768)
    assert found["Q8_0"].shape == (4, 3, 4, 4)
    expected = {name: gguf.quants.dequantize(made, TYPES[n]) for name, (made, n) in packed.items()}
    for name, array in {"plain": plain, "halves": halves, **expected}.items():
        with found[name].view() as numbers:
            np.testing.assert_allclose(numbers.reshape(array.shape), array, rtol=1e-6, atol=1e-6)
    part = found["Q4_K"].file.array(4 * 300, 4 * 20).view(np.float32)
    np.testing.assert_allclose(part, expected["Q4_K"].ravel()[300:320], rtol=1e-6, atol=1e-6)


def test_damaged_files(tmp_path):
    write(tmp_path / "a.gguf", {"w": (blocks(12, 2).reshape(2, -1), 12)})
    whole = (tmp_path / "a.gguf").read_bytes()
    bad = tmp_path / "b.gguf"

    def refused(data, message):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            ours.read(bad)

    refused(b"nothing of the kind", "is no GGUF file of version 2 or 3")
    refused(whole[:-200], "'w' of shape .2, 256., Q4_K at 0, does not fit")
    refused(whole[:40], "its header would go on for")
    refused(whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:], "it lists 1,152,921,504,606,846,976 entries")
    at = whole.index(b"w", 100) + 1 + 4 + 16  # behind the name: how many axes, and they
    refused(whole[:at] + struct.pack("<I", 99) + whole[at + 4 :], "'w' is packed as number 99, which is not known here")
