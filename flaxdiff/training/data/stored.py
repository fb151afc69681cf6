"""Latents and encoded texts that `precompute` wrote, as a source of examples.

A folder holds `precomputed.json`, which says what was written and how, `empty.safetensors`, the encoding of an empty
text, and `shard-….safetensors`, each with the examples of a range of the data set:

    64x96/latents [n, samples, h, w, c]    examples of pictures of 64 x 96 pixels, and whatever else they have
    64x96/text [n]                         which of the shard's texts is theirs
    text/prompt_embeds [m, N, D]           the texts, each once
    captions, faults                       JSON in UTF-8: the texts themselves, and [name, reason] of what was left out

A folder is opened only when every file in it is whole and fits the others; numbers are read when they are asked for.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxdiff.checkpoint import files, safetensors
from flaxdiff.checkpoint.tensors import Tensor, damaged
from flaxdiff.training.data.examples import Draw
from flaxdiff.training.data.faults import BadExample, Fault
from flaxdiff.training.data.pictures import Size

MANIFEST, EMPTY = "precomputed.json", "empty.safetensors"


class Place(NamedTuple):
    """Where an example lies."""

    shard: Path
    size: Size
    row: int


@dataclasses.dataclass(frozen=True, eq=False)
class Precomputed:
    """The examples of a folder, in the order of the data set that they were made of; see `of`.

    Attributes:
      folder: where they are.
      places: where each is.
      columns, faults: as of `Source`.
    """

    folder: Path
    places: tuple[Place, ...]
    columns: tuple[str, ...]
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, folder: Path) -> "Precomputed":
        """Open a folder.

        Raises:
          ValueError: files are missing, damaged, do not fit the others, or hold no example.
        """
        opened.cache_clear(), empty.cache_clear()  # files may have been written again
        manifest = files.read_json(folder / MANIFEST)
        paths = [folder / name for name in shards(manifest)]
        if missing := [path.name for path in (*paths, folder / EMPTY) if not path.is_file()]:
            raise ValueError(
                f"{folder} lacks {files.listed(missing)}; run the command that writes it again: it goes on from there."
            )
        forms: Forms = {"text": {name: (a.shape, a.dtype) for name, a in empty(folder / EMPTY).items()}}
        places: list[tuple[int, Place]] = []
        faults, size = [], manifest["shard_size"]
        for first, path in zip(range(0, manifest["examples"], size), paths):
            with readable(path):
                groups, wrong = contents(path, range(first, min(first + size, manifest["examples"])), forms)
            faults += wrong
            places += [(i, Place(path, of, row)) for of, index in groups.items() for row, i in enumerate(index)]
        if not places:
            raise ValueError(f"{folder} holds no example; the data it was made of had none of use.")
        ordered = tuple(place for _, place in sorted(places, key=lambda pair: pair[0]))
        columns = {**forms[f"{ordered[0].size[0]}x{ordered[0].size[1]}"], **forms["text"]}
        return cls(folder, ordered, ("caption", *(c for c in columns if c not in ("index", "text"))), tuple(faults))

    def __len__(self) -> int:
        return len(self.places)

    def name(self, i: int) -> str:
        shard, (height, width), row = self.places[i]
        return f"{shard.name}:{height}x{width}[{row}]"

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The arrays of an example, its caption, and `empty`, what an empty text is."""
        shard, (height, width), row = self.places[i]
        tensors, prefix, found = opened(shard), f"{height}x{width}/", {}
        text = int(one(tensors[f"{prefix}text"], row))
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = one(tensor, row)
            elif name.startswith("text/"):
                found[name.removeprefix("text/")] = one(tensor, text)
        found = {k: v for k, v in found.items() if k not in ("index", "text")}
        caption = read_lists(shard, tensors["captions"])[text]
        return {**found, "caption": caption, "empty": empty(self.folder / EMPTY)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What is made of the examples of a `Precomputed`: batches of its arrays, in the place of `Examples`.

    Attributes:
      proportion_empty_prompts: the share of examples whose text is empty, for guidance.
    """

    proportion_empty_prompts: float = 0.0
    columns: tuple[str, ...] = ("latents", "caption")

    def grouped(self, source: Precomputed, chosen: Iterable[int], faults: list[Fault]) -> dict[Size, list[int]]:
        """The examples by the size of their pictures."""
        groups: dict[Size, list[int]] = {}
        for i in map(int, chosen):
            groups.setdefault(source.places[i].size, []).append(i)
        return dict(sorted(groups.items()))

    def make(self, row: Mapping[str, Any], chances: Draw, size: Size) -> dict[str, Any]:
        """An example: of the samples of its latents one, and its text or an empty one. Raises BadExample for NaNs."""
        made = {name: value for name, value in row.items() if name != "empty"}
        for name in [name for name in made if name.endswith("latents")]:
            samples = made[name]
            made[name] = samples[int(chances.across * len(samples))]
        for name, value in made.items():
            if name != "caption" and not np.isfinite(value.astype(np.float32)).all():
                raise BadExample(f"with {name} that are not finite")
        if chances.empty < self.proportion_empty_prompts:
            made |= {**row["empty"], "caption": ""}
        return made


def shards(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the shards that a manifest asks for.

    >>> shards({"examples": 5, "shard_size": 4})
    ['shard-00000.safetensors', 'shard-00001.safetensors']
    """
    examples, size = manifest.get("examples"), manifest.get("shard_size")
    if not (type(examples) is int and type(size) is int and 0 < size and 0 < examples <= 10**12):
        raise ValueError(f"{MANIFEST} does not say how many examples there are: {dict(manifest)}; write it again.")
    return [f"shard-{s:05}.safetensors" for s in range(-(-examples // size))]


Forms = dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]]  # a size, or "text" -> array -> shape, dtype of a row


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file of the folder names it, and says how to have it written again."""
    try:
        yield
    except (ArithmeticError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        said = error if str(path) in str(error) else damaged(path, f"it is not what precompute writes ({error!r})")
        raise ValueError(
            f"{said} Delete this file, then run the command that wrote the folder: it makes what is missing."
        ) from error


def contents(path: Path, numbers: range, forms: Forms) -> tuple[dict[Size, list[int]], list[Fault]]:
    """What a shard holds, once its parts are seen to agree: the numbers of its examples by size; what was left out.

    Args:
      path: the file.
      numbers: which examples of the data set are the shard's.
      forms: of the arrays of earlier shards; what is new is added.

    Raises:
      ValueError: the parts contradict each other; or whatever Python raises for what was never a shard.
    """
    tensors, groups, own = opened(path), {}, {}
    captions, pairs = (read_lists(path, tensors[name]) for name in ("captions", "faults"))
    faults = [Fault(str(name), str(reason)) for name, reason in pairs]
    for name, tensor in tensors.items():
        if "/" in name:
            group, column = name.split("/")
            own.setdefault(group, {})[column] = tensor
    for group, arrays in own.items():
        form = {column: (tensor.shape[1:], tensor.dtype) for column, tensor in arrays.items()}
        length = len(captions) if group == "text" else arrays["index"].shape[0]
        if form != forms.setdefault(group, form) or any(tensor.shape[0] != length for tensor in arrays.values()):
            raise damaged(path, f"its arrays {group}/… are not {length} rows of what the files beside it hold")
        if group != "text":
            height, width = map(int, group.split("x"))
            groups[height, width] = whole(arrays["index"]).tolist()
            if not set(whole(arrays["text"]).tolist()) <= set(range(len(captions))):
                raise damaged(path, f"{group}/text is of texts that it does not hold")
    if len({tuple(sorted(form)) for group, form in forms.items() if group != "text"}) > 1:
        raise damaged(path, "its examples have other columns than those before")
    seen = [i for index in groups.values() for i in index]
    if len(seen) + len(faults) != len(numbers) or len(set(seen)) < len(seen) or not set(seen) <= set(numbers):
        raise damaged(path, f"its examples are not those from {numbers.start} to {numbers.stop - 1} of the data")
    return groups, faults


@functools.lru_cache(1024)
def opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, none of them read yet."""
    return safetensors.read(path)


def one(tensor: Tensor, row: int) -> np.ndarray:
    """A row of a tensor; what else it holds is not read."""
    with tensor.view(checked=False) as numbers:
        return np.array(numbers[row])


def whole(tensor: Tensor) -> np.ndarray:
    with tensor.view() as numbers:
        return np.array(numbers)


def read_lists(path: Path, tensor: Tensor) -> list[Any]:
    """A list that was written as JSON."""
    try:
        return _json(whole(tensor).tobytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its texts are no JSON ({error})") from error


@functools.lru_cache(64)
def _json(text: bytes) -> list[Any]:
    found = json.loads(text.decode())
    if not isinstance(found, list):
        raise ValueError("not a list")
    return found


@functools.lru_cache(4)
def empty(path: Path) -> dict[str, np.ndarray]:
    """The encoding of an empty text. Raises ValueError: the file is damaged, or something else."""
    with readable(path):
        return {name.removeprefix("text/"): whole(tensor)[0] for name, tensor in opened(path).items()}
