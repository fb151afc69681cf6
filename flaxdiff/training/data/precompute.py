"""Encode a data set once: the latents of its pictures and what the text encoders make of its captions.

Training then needs neither the autoencoder nor the text encoders, which saves their memory and most of the time. Each
process takes shards of its own; a shard is written beside its place and renamed when it is complete, so a run that was
stopped goes on with those that are missing. How the folder is laid out is said in `stored.py`, which reads it.
"""

import concurrent.futures
import contextlib
import inspect
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxdiff import parallel
from flaxdiff.checkpoint import files, safetensors
from flaxdiff.core import Params
from flaxdiff.pipelines.generate import DENOISERS, Networks
from flaxdiff.pipelines.tasks import native_size, stride
from flaxdiff.schedulers.tables import folded, image_keys
from flaxdiff.training.data.batches import CHANCES, Batch, collate, joined
from flaxdiff.training.data.examples import Examples, draw
from flaxdiff.training.data.faults import BadExample, Fault, Report
from flaxdiff.training.data.pictures import Size
from flaxdiff.training.data.protocol import Source, check_columns
from flaxdiff.training.data.stored import EMPTY, MANIFEST, shards

if TYPE_CHECKING:
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

# what the families' conditions are called where a call is given them
GIVEN = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_mask"}


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
      ValueError: a pipeline without an autoencoder, sizes that do not divide, a folder written with other arguments.
    """
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
    wrong: list[Fault] = []
    groups = examples.grouped(source, range(len(source)), wrong)
    step = stride(pipe)
    if odd := [size for size in groups if size[0] % step or size[1] % step]:
        raise ValueError(
            f"Pictures of {odd[:3]} (height, width): {type(pipe).__name__} takes multiples of {step} pixels."
        )
    sizes = {int(i): size for size, group in groups.items() for i in group}
    unusable = {fault.name: fault.reason for fault in wrong}

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    manifest = {
        "examples": len(source),
        "shard_size": shard_size,
        "samples": samples,
        "seed": seed,
        "made": repr(examples),
        "pipeline": type(pipe).__name__,
    }
    agree(out / MANIFEST, manifest)
    mesh = parallel.make_mesh(devices=jax.local_devices()[: math.gcd(batch_size, jax.local_device_count())])
    params = parallel.replicate(params, mesh)
    read = text_encoder(pipe, params, mesh, batch_size)
    see = image_encoder(pipe, params, mesh, tuple(examples.images), samples, seed)
    if not (out / EMPTY).exists():
        write(out / EMPTY, {f"text/{name}": array for name, array in read([""]).items()})

    report, names = Report.of(source.faults), shards(manifest)
    for s in range(process_index, len(names), process_count):
        if (out / names[s]).exists():
            continue
        numbers = range(s * shard_size, min((s + 1) * shard_size, len(source)))
        faults = [Fault(source.name(i), unusable[source.name(i)]) for i in numbers if i not in sizes]
        own = {i: sizes[i] for i in numbers if i in sizes}
        arrays, captions = {}, {}  # a caption -> its number
        for (height, width), columns in encoded(source, examples, own, batch_size, seed, see, faults).items():
            told = columns.pop("caption", [""] * len(columns["index"]))
            columns["text"] = np.int32([captions.setdefault(caption, len(captions)) for caption in told])
            arrays |= {f"{height}x{width}/{name}": array for name, array in columns.items()}
        arrays |= {f"text/{name}": array for name, array in (read(list(captions)) if captions else {}).items()}
        write(out / names[s], {**arrays, "captions": as_json(list(captions)), "faults": as_json(faults)})
        report.add(faults)
        log(f"{names[s]}: {numbers.stop} of {len(source)} examples")
    return report


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


class Encoders(Networks):
    """Networks of which the one in the loop makes nothing of a text: it is what is trained."""

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return args[0] if name in DENOISERS else super().__call__(name, *args, **kwargs)


def text_encoder(
    pipe: "DiffusionPipeline", params: Mapping[str, Params], mesh: Mesh, batch_size: int
) -> Callable[[Sequence[str]], Batch]:
    """Captions -> arrays [N, …] by the names that a call of the pipeline gives them, so many captions at a time."""
    size = native_size(pipe)
    takes = inspect.signature(pipe.family.prepare).parameters
    told = {name: value for name, value in {"guidance_scale": 1.0}.items() if name in takes}

    @jax.jit
    def run(params: Mapping[str, Params], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        cond = pipe.family.encode(Encoders(dict(pipe.specs), params), {**inputs, "size": size})["positive"]
        return {GIVEN.get(name, name): value for name, value in cond.items() if name not in inputs}

    def read(captions: Sequence[str]) -> Batch:
        if "prompt" not in takes:
            return {}
        parts = []
        for at in range(0, len(captions), batch_size):
            part = list(captions[at : at + batch_size])
            filled = part + part[-1:] * (batch_size - len(part))
            inputs = pipe.family.prepare(pipe, size, False, prompt=filled, **told)
            found = jax.device_get(run(params, parallel.shard(repeated(inputs, batch_size), mesh)))
            parts.append({name: array[: len(part)] for name, array in found.items()})
        return joined(parts)

    return read


def repeated(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Inputs with a row for each caption where there was one for all; numbers stay."""
    rows = lambda a: np.repeat(a, batch, 0) if np.ndim(a) and len(a) == 1 else np.asarray(a)
    return {name: rows(a) for name, a in inputs.items()}


def image_encoder(
    pipe: "DiffusionPipeline", params: Mapping[str, Params], mesh: Mesh, images: Sequence[str], samples: int, seed: int
) -> Callable[[Batch], Batch]:
    """A batch -> the same with latents [B, samples, …] in the place of pictures, drawn by each example's own key."""

    @jax.jit
    def run(params: Mapping[str, Params], index: jax.Array, pixels: dict[str, jax.Array]) -> dict[str, jax.Array]:
        networks, keys = Networks(dict(pipe.specs), params), image_keys(jax.random.key(seed), len(index), index)
        draws = range(max(samples, 1))
        see = lambda x, i: pipe.family.encode_image(networks, x, folded(keys, i), 1.0 if samples else 0.0)
        return {name: jnp.stack([see(x, i) for i in draws], 1) for name, x in pixels.items()}

    def encode(batch: Batch) -> Batch:
        given = np.int32(batch["index"]), {name: batch[name] for name in images}
        seen = jax.device_get(run(params, *parallel.shard(given, mesh)))
        names = {name: f"{name}_latents" if i else "latents" for i, name in enumerate(images)}
        return {k: v for k, v in batch.items() if k not in images} | {names[k]: v for k, v in seen.items()}

    return encode


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


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, in one step."""
    with beside(path) as new:
        safetensors.write(new, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.values())


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """The name of a new file, which takes the place of `path` when it is complete, or vanishes when anything fails."""
    new = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def as_json(values: Sequence[Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(values, ensure_ascii=False).encode(), np.uint8)
