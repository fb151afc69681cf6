"""Encode a data set once: the latents of its pictures and what the text encoders make of its captions.

Training then needs neither the autoencoder nor the text encoders, which saves their memory and most of the time. Each
process takes shards of its own; a shard is written beside its place and renamed when it is complete, so a run that was
stopped goes on with those that are missing. How the folder is laid out is said in `stored.py`, which reads it.
"""

import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flaxdiff import parallel
from flaxdiff.checkpoint import files, safetensors
from flaxdiff.core import Params
from flaxdiff.pipelines.tasks import stride
from flaxdiff.training.data.batches import CHANCES, Batch, collate, joined
from flaxdiff.training.data.encoders import image_encoder, text_encoder
from flaxdiff.training.data.examples import Examples, draw
from flaxdiff.training.data.faults import BadExample, Fault, Report
from flaxdiff.training.data.pictures import Size
from flaxdiff.training.data.protocol import Source, check_columns
from flaxdiff.training.data.stored import EMPTY, MANIFEST, empty, shards

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline


def precompute(
    pipe: "DiffusionPipeline",
    params: Mapping[str, Params],
    source: Source,
    examples: Examples,
    out: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    samples: int = 1,
    shard_size: int = 256,
    process_index: int = 0,
    process_count: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write the latents and the encoded captions of a data set.

    Args:
      pipe, params: the model whose autoencoder and text encoders are asked.
      source: the data set, with random access.
      examples: how pictures are cut, and what is a caption; chances fall as `seed` says. Every picture becomes latents:
        the first as "latents", others as their name and "_latents". Leave empty texts to training.
      out: a folder; made if it is not there. What it holds of an earlier run with the same arguments stays.
      batch_size: pictures, or captions, encoded at once.
      samples: how many latents are drawn of each picture; 0 takes the mean.
      shard_size: examples of the data set to a file.
      process_index, process_count: which shards are this process's.
      log: what takes a line of progress.

    Returns:
      What was left out of the shards that this call wrote.

    Raises:
      ValueError: a pipeline without an autoencoder, sizes that do not divide, a folder that is a URL or was
        written with other arguments.
    """
    out = files.local(out)
    check_columns(source, examples.columns)
    if pipe.family.encode_image is None:
        raise ValueError(f"{type(pipe).__name__} has no way from pictures to latents; use a text-to-image pipeline.")
    if batch_size < 1 or samples < 0 or shard_size < 1 or not 0 <= process_index < process_count:
        asked = f"{batch_size=}, {samples=}, {shard_size=}, {process_index=}, {process_count=}"
        raise ValueError(f"Of {asked} one is out of range; samples and process_index count from 0, the others from 1.")
    if len(examples.texts) > 1:
        raise ValueError(
            f"One text of an example is encoded, not {', '.join(examples.texts)}; give texts= of one name."
        )
    sizes, unusable = sized(pipe, source, examples)
    out.mkdir(parents=True, exist_ok=True)
    manifest = {
        "examples": len(source),
        "shard_size": shard_size,
        "samples": samples,
        "seed": seed,
        "made": repr(examples),
        "pipeline": type(pipe).__name__,
        "data": [source.name(0), source.name(len(source) - 1)],
    }
    agree(out / MANIFEST, manifest)
    mesh = parallel.make_mesh(devices=jax.local_devices()[: math.gcd(batch_size, jax.local_device_count())])
    params = parallel.replicate(params, mesh)
    read = text_encoder(pipe, params, mesh, batch_size)
    see = image_encoder(pipe, params, mesh, tuple(examples.images), samples, seed)
    agree_on_empty(out / EMPTY, read([""]))

    caption = next(iter(examples.texts), "caption")
    report, names = Report.of(source.faults), shards(manifest)
    for s in range(process_index, len(names), process_count):
        if (out / names[s]).exists():
            continue
        numbers = range(s * shard_size, min((s + 1) * shard_size, len(source)))
        faults = [Fault(source.name(i), unusable[source.name(i)]) for i in numbers if i not in sizes]
        own = {i: sizes[i] for i in numbers if i in sizes}
        arrays, captions = {}, {}  # a text -> its number
        for (height, width), columns in encoded(source, examples, own, batch_size, seed, see, faults).items():
            told = columns.pop(caption, [""] * len(columns["index"]))
            columns["text"] = np.int32([captions.setdefault(text, len(captions)) for text in told])
            arrays |= {f"{height}x{width}/{name}": array for name, array in columns.items()}
        arrays |= {f"text/{name}": array for name, array in (read(list(captions)) if captions else {}).items()}
        write(out / names[s], {**arrays, "captions": as_json(list(captions)), "faults": as_json(faults)})
        report.add(faults)
        log(f"{names[s]}: {numbers.stop} of {len(source)} examples")
    return report


def sized(pipe: "DiffusionPipeline", source: Source, examples: Examples) -> tuple[dict[int, Size], dict[str, str]]:
    """At which size each example is made, and of those that cannot be used the name and the reason.

    Raises:
      ValueError: the pipeline does not take such sizes.
    """
    wrong: list[Fault] = []
    groups, step = examples.grouped(source, range(len(source)), wrong), stride(pipe)
    if odd := [size for size in groups if size[0] % step or size[1] % step]:
        raise ValueError(
            f"Pictures of {odd[:3]} (height, width): {type(pipe).__name__} takes multiples of {step} pixels."
        )
    return {int(i): size for size, group in groups.items() for i in group}, dict(wrong)


def encoded(
    source: Source,
    examples: Examples,
    sizes: Mapping[int, Size],
    batch_size: int,
    seed: int,
    see: Callable[[Batch], Batch],
    faults: list[Fault],
) -> dict[Size, Batch]:
    """Of some examples, by size: one batch of all. Those of no use go to `faults`."""

    def make(i: int) -> dict[str, Any] | Fault:
        try:
            return {"index": np.int64(i), **examples.make(source[i], draw(seed, CHANCES, i), sizes[i])}
        except BadExample as error:
            return Fault(source.name(i), str(error))

    groups: dict[Size, list[int]] = {}
    for i, size in sizes.items():
        groups.setdefault(size, []).append(i)
    parts = [group[at : at + batch_size] for group in groups.values() for at in range(0, len(group), batch_size)]
    found: dict[Size, list[Batch]] = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        begin = lambda part: [pool.submit(make, i) for i in part]
        ahead = begin(parts[0]) if parts else []
        for part, after in itertools.zip_longest(parts, parts[1:], fillvalue=()):
            made, ahead = [future.result() for future in ahead], begin(after)
            faults += [example for example in made if isinstance(example, Fault)]
            if good := [example for example in made if not isinstance(example, Fault)]:
                filled = collate(good + good[-1:] * (batch_size - len(good)))  # one shape, one program
                seen = {name: array[: len(good)] for name, array in see(filled).items()}
                found.setdefault(sizes[part[0]], []).append(seen)
    return {size: joined(parts) for size, parts in found.items()}


def agree(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest, or see that the one that is there says the same.

    Raises:
      ValueError: it says something else.
    """
    if path.exists():
        there = files.read_json(path)
        if differ := {k: (there.get(k), v) for k, v in manifest.items() if there.get(k) != v}:
            said = "; ".join(f"{k} was {old!r} and is {new!r}" for k, (old, new) in differ.items())
            raise ValueError(
                f"{path.parent} was written otherwise: {said}. Give the same arguments, or another folder."
            )
    else:
        with beside(path) as new:
            files.write_json(new, manifest)


def agree_on_empty(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the encoding of an empty text, or see that the one that is there is of the same model.

    Raises:
      ValueError: it is not.
    """
    if not path.exists():
        return write(path, {f"text/{name}": array for name, array in arrays.items()})
    there = empty(path)
    near = lambda a, b: a.shape == b.shape and np.abs(np.float32(a) - np.float32(b)).max() <= 0.05 * np.abs(b).max()
    if there.keys() != arrays.keys() or not all(near(there[name], array[0]) for name, array in arrays.items()):
        raise ValueError(f"{path.parent} was written with another model; give that, or another folder.")


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, in one step."""
    with beside(path) as new:
        safetensors.write(new, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.values())


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """The name of a new file, which takes the place of `path` when it is complete, or vanishes when anything fails."""
    new = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def as_json(values: Sequence[Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(values, ensure_ascii=False).encode(), np.uint8)
