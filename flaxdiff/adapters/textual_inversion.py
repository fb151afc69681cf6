"""Textual inversion: a new word, learned as vectors beside those of the text encoder's vocabulary.

The vectors become further rows of the embedding table, and the tokenizer puts their ids where the word stands: as many
as it has vectors. A word works in any prompt, the negative one as well.

Reference: Gal et al., An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, 2022.
"""

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flaxdiff.checkpoint import files, hub, pickles, safetensors
from flaxdiff.checkpoint.tensors import Tensor, damaged
from flaxdiff.core import Params

TABLE = "text_model.embeddings.token_embedding.weight"
NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # what SDXL's files call the two


@dataclass(frozen=True)
class Extended:
    """A tokenizer that knows some words more.

    Attributes:
      tokenizer: of CLIP's kind: a start, the tokens, an end, padding.
      words: (word, the ids that stand for it); found in any letter case.
    """

    tokenizer: Any
    words: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def class_name(self) -> str:
        """transformers' name of the tokenizer's class."""
        return self.tokenizer.class_name

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        ((start, end, *rest),) = np.asarray(self.tokenizer([""])).tolist()
        length, pad = 2 + len(rest), rest[-1] if rest else end
        ids = {word.lower(): own for word, own in self.words}
        split = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))), re.IGNORECASE)

        def plain(piece: str) -> list[int]:
            row = np.asarray(self.tokenizer([piece]))[0].tolist()
            return row[1 : row.index(end, 1)]

        rows = []
        for text in texts:
            row, at = [], 0
            for word in split.finditer(text):
                row += plain(text[at : word.start()]) + list(ids[word[0].lower()])
                at = word.end()
            row += plain(text[at:])
            if len(row) > length - 2:
                warnings.warn(f"Only the first {length - 2} tokens of {text!r} are read.", stacklevel=2)
            row = [start, *row[: length - 2], end]
            rows.append(row + [pad] * (length - len(row)))
        return np.asarray(rows)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, and the words as transformers keeps them: `word`, `word_1`, …, an id each."""
        self.tokenizer.save(folder)
        each = {word + (f"_{i}" if i else ""): n for word, ids in self.words for i, n in enumerate(ids)}
        files.write_json(folder / "added_tokens.json", each)


def load_textual_inversion(
    pipe: Any,
    params: Mapping[str, Params],
    source: str | os.PathLike[str],
    token: str | None = None,
    *,
    weight_name: str | None = None,
    **download: Any,
) -> tuple[Any, dict[str, Params]]:
    """A pipeline and its parameters with a learned word more.

    Args:
      pipe, params: to begin with; they stay as they are.
      source: a file of diffusers (`{word: vectors}`), A1111 (`string_to_param`, `emb_params`) or SDXL (`clip_l`,
        `clip_g`), as safetensors or pickle, of which nothing is run; or a folder or Hub repository with one.
      token: the word; by default the one in the file, or else the file's name.
      weight_name: which file of a folder.
      **download: as of `hub.fetch`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no embedding, or one for other text encoders; or the word is known already.

    >>> import flaxdiff, tempfile
    >>> pipe, params = flaxdiff.load()
    >>> width = params["text_encoder"][TABLE].shape[1]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     vectors = np.ones((2, width), np.float32)
    ...     path = Path(folder, "learned_embeds.safetensors")
    ...     safetensors.write(path, {"<cat>": (vectors.shape, vectors.dtype)}, [vectors])
    ...     more, extended = load_textual_inversion(pipe, params, folder)
    >>> before, after = params["text_encoder"][TABLE].shape[0], extended["text_encoder"][TABLE].shape[0]
    >>> after - before, more.tokenizer(["a <cat>"])[0, 2:4].tolist() == [before, before + 1]
    (2, True)
    """
    path = hub.locate(source, NAMES if weight_name is None else (weight_name,), **download)
    word, vectors = _read(path)
    return add_word(pipe, params, token or word, _placed(params, vectors, path))


def add_word(
    pipe: Any, params: Mapping[str, Params], word: str, vectors: Mapping[str, Any]
) -> tuple[Any, dict[str, Params]]:
    """A pipeline and its parameters with a word more.

    Args:
      pipe, params: to begin with; they stay as they are.
      word: as it stands in prompts.
      vectors: text encoder -> [n, D].

    Raises:
      ValueError: the word is known already.
    """
    params, specs, tokenizers = dict(params), dict(pipe.specs), dict(pipe.tokenizers)
    for encoder, rows in vectors.items():
        name = encoder.replace("text_encoder", "tokenizer")
        table = params[encoder][TABLE]
        known = tokenizers[name].words if isinstance(tokenizers[name], Extended) else ()
        if word.lower() in {w.lower() for w, _ in known}:
            raise ValueError(f"{name} knows {word!r} already; give another token=.")
        bare = tokenizers[name].tokenizer if known else tokenizers[name]
        ids = tuple(range(len(table), len(table) + len(rows)))
        tokenizers[name] = Extended(bare, (*known, (word, ids)))
        new = jnp.concatenate([table, jnp.asarray(rows, table.dtype)])
        params[encoder] = {**params[encoder], TABLE: new}
        # The end of a text is found by its id: older configurations look for the largest one, which now is another.
        end = int(bare([""])[0][1])
        specs[encoder] = specs[encoder].replace(vocab_size=len(new), eos_token_id=end)
    return pipe.replace(specs=tuple(specs.items()), tokenizers=tuple(tokenizers.items())), params


def save_textual_inversion(folder: str | os.PathLike[str], word: str, vectors: Mapping[str, Any]) -> None:
    """Write a word as `learned_embeds.safetensors`, as PyTorch's diffusers reads it.

    Args:
      folder: where to write; made if it is not there.
      word: as it stands in prompts.
      vectors: text encoder -> [n, D]; of two they are filed under the names that SDXL's files have.
    """
    filed = {encoder: key for key, encoder in ENCODERS.items()} if len(vectors) > 1 else dict.fromkeys(vectors, word)
    arrays = {filed[encoder]: np.asarray(rows, np.float32) for encoder, rows in vectors.items()}
    with files.staged(Path(folder)) as stage:
        shapes = {key: (array.shape, array.dtype) for key, array in arrays.items()}
        safetensors.write(stage / NAMES[0], shapes, arrays.values())


def _read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The word in a file, and its vectors [n, D] under the text encoder's name, or "" for whichever they fit."""
    found = safetensors.read(path) if path.suffix == ".safetensors" else pickles.contents(path)
    if not isinstance(found, Mapping):
        raise damaged(path, "it holds no dictionary")
    if isinstance(inner := found.get("string_to_param"), Mapping):  # A1111's pickles
        word, vectors = str(found.get("name") or path.stem), {"": next(iter(inner.values()), None)}
    elif set(found) & set(ENCODERS):
        word, vectors = path.stem, {ENCODERS[name]: found[name] for name in ENCODERS if name in found}
    else:
        word, vectors = next(iter(found), ""), {"": next(iter(found.values()), None)}
        word = path.stem if word == "emb_params" else word
    wrong = len(found) > 1 and "" in vectors and "string_to_param" not in found
    if wrong or not word or not all(isinstance(v, Tensor) and len(v.shape) in (1, 2) for v in vectors.values()):
        keys = sorted(map(str, found))[:6]
        raise ValueError(
            f"{path} holds no textual inversion: its keys are {keys}; wanted is one word, string_to_param, or clip_l "
            "and clip_g."
        )
    return word, {encoder: _numbers(path, tensor) for encoder, tensor in vectors.items()}


def _numbers(path: Path, tensor: Tensor) -> np.ndarray:
    with tensor.view() as numbers:
        rows = np.atleast_2d(np.asarray(numbers, np.float32)).copy()
    if not np.isfinite(rows).all():
        raise damaged(path, "an embedding holds infinities or NaNs")
    return rows


def _placed(params: Mapping[str, Params], vectors: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The vectors under the text encoders that they belong to."""
    widths = {name: own[TABLE].shape[1] for name, own in params.items() if TABLE in own}
    placed = {}
    for encoder, rows in vectors.items():
        fit = [name for name, width in widths.items() if width == rows.shape[1] and encoder in ("", name)]
        if not fit:
            raise ValueError(
                f"{path} has vectors of {rows.shape[1]} numbers{encoder and ' for ' + encoder}, and the text encoders "
                f"have {widths}; it was learned with another model."
            )
        placed[fit[0]] = rows
    return placed
