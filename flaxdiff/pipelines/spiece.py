"""SentencePiece's files, read without that library: the vocabulary that T5's tokenizer is made of.

`spiece.model` is a message in protobuf's wire format: fields, each with a number and a value. Two of them matter here:
the pieces of words with their scores, and how letters are normalised before.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flaxdiff.checkpoint import files
from flaxdiff.checkpoint.tensors import damaged

PIECES, NORMALIZER = 1, 3  # numbers of fields in the message,
PIECE, SCORE = 1, 2  # in a piece
CHARSMAP = 2  # and in the normaliser


class Pieces(NamedTuple):
    """What a file says."""

    vocab: list[tuple[str, float]]  # piece and score, in the order of their ids
    charsmap: bytes | None  # how letters are normalised


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value. Raises IndexError or ValueError where it is none.

    >>> list(fields(bytes([0x08, 0x96, 0x01, 0x12, 0x02, 0x68, 0x69])))
    [(1, 150), (2, b'hi')]
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift >= 70:
                raise ValueError("a number has more than ten bytes")

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, len(message))
        at += size
        if at > len(message):
            raise ValueError(f"a field of {size} bytes ends beyond the message")
        yield number, message[at - size : at]


def read(path: Path) -> Pieces:
    """The pieces in a file. Raises ValueError where it is no model of SentencePiece."""
    vocab, charsmap = [], None
    try:
        for number, value in fields(path.read_bytes()):
            if number == PIECES:
                piece = dict(fields(value))
                vocab.append((piece[PIECE].decode(), struct.unpack("<f", piece.get(SCORE, bytes(4)))[0]))
            elif number == NORMALIZER:
                charsmap = dict(fields(value)).get(CHARSMAP) or None
        if not vocab:
            raise ValueError("it has no pieces")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as e:
        raise damaged(path, f"it is no SentencePiece model: {e}") from None
    return Pieces(vocab, charsmap)


def t5_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of T5 from `spiece.model` and what `tokenizer_config.json` says beside it."""
    import transformers

    path = folder / "tokenizer_config.json"
    said = files.read_json(path) if path.is_file() else {}
    vocab, charsmap = read(folder / "spiece.model")
    extra = said.get("extra_ids", 100)  # tokens without a meaning, the last first
    if not isinstance(extra, int) or not 0 <= extra <= 1000:
        raise damaged(path, f"its extra_ids is {extra!r}, not a number up to 1000")
    vocab = vocab + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra))]
    names = "model_max_length", "eos_token", "unk_token", "pad_token"
    kept = {name: said[name] for name in names if isinstance(said.get(name), int | str)}
    return transformers.T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=charsmap, extra_ids=extra, **kept)
