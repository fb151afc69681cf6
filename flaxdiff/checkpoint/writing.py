"""Saving: from specs and parameters to a folder in the layout of diffusers or transformers, which PyTorch loads."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxdiff import weights
from flaxdiff.checkpoint import convert, files, safetensors
from flaxdiff.checkpoint.tensors import buffer, copy, finite, network_dtype
from flaxdiff.core import Params, Spec, abstract, layout

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]  # name in the file -> shape there and dtype


def save_model(
    folder: str | os.PathLike[str],
    spec: Spec,
    params: Params,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> None:
    """Write a model's `config.json` and weights, as PyTorch's diffusers or transformers would.

    Everything is written beside the folder first and moved there when it is complete; a failure leaves nothing behind.
    Adapters (`LoRA`) are merged, quantised weights (`Int8`) expanded. Parameters pass through the host one at a time.

    Args:
      folder: where to write; other files in it stay.
      spec: the model.
      params: a weight for each name in `flaxdiff.abstract(spec)`, and nothing else.
      dtype: of the numbers in the file; by default as they are.
      max_shard_size: bytes, or a text such as "5GB"; more go to several files and an index.
      variant: part of the files' names, e.g. "fp16".

    Raises:
      ValueError: a parameter is missing, unknown, of another shape or of an unsupported dtype, or holds infinities or
        NaNs.
    """
    with files.staged(Path(folder)) as stage:
        write_model(stage, spec, params, dtype=dtype, max_shard_size=max_shard_size, variant=variant)


def write_model(
    folder: Path,
    spec: Spec,
    params: Params,
    *,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> None:
    """As `save_model`, into an existing folder and without its precautions."""
    _check(spec, params)
    kept = {name: network_dtype(weights.dtype(params[name]) if dtype is None else dtype) for name in params}
    shapes: Shapes = {}
    own: dict[str, str] = {}  # name in the file -> parameter
    wide_first = sorted(layout(spec).items(), key=lambda item: -kept[item[0]].itemsize)  # so every number is aligned
    for name, leaf in wide_first:
        for file_name in convert.names_in_file(name, leaf):
            shapes[file_name], own[file_name] = (convert.shape_in_file(leaf), kept[name]), name

    stem = files.STEMS[spec.module.library]["safetensors"] + (f".{variant}" if variant else "")
    shards = _shards(shapes, _bytes(max_shard_size))
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        part = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        index |= dict.fromkeys(shard, f"{stem}{part}.safetensors")
        safetensors.write(folder / f"{stem}{part}.safetensors", shard, _numbers(spec, params, shard, own))
    if len(shards) > 1:
        total = sum(_size(*entry) for entry in shapes.values())
        name = f"{stem.partition('.')[0]}.safetensors.index{'.' + variant if variant else ''}.json"
        files.write_json(folder / name, {"metadata": {"total_size": total}, "weight_map": index})
    files.write_json(folder / files.CONFIG, spec.module.to_config(spec.config))


def _check(spec: Spec, params: Params) -> None:
    shapes = abstract(spec)
    actual = {name: jax.eval_shape(weights.dense, weight).shape for name, weight in params.items()}
    faults = [f"- {name}" for name in shapes if name not in params]
    faults += [f"+ {name}" for name in params if name not in shapes]
    faults += [
        f"± {name} is {list(actual[name])}, the model has {list(shape.shape)}"
        for name, shape in shapes.items()
        if name in params and actual[name] != shape.shape
    ]
    if faults:
        raise ValueError(
            f"These parameters are not those of {spec.module.__name__}: {files.listed(faults)}; save them with the "
            "spec that they were made from."
        )


def _bytes(size: int | str) -> int:
    """A size in bytes.

    >>> _bytes("1.5GB"), _bytes(10)
    (1500000000, 10)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)\s*", str(size).upper())
    if isinstance(size, int) and size > 0:
        return size
    if found is None or float(found[1]) == 0:
        raise ValueError(f"max_shard_size={size!r} is no size; give bytes, or a text such as '5GB' or '200MB'.")
    return int(float(found[1]) * UNITS[found[2]])


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _shards(shapes: Shapes, limit: int) -> list[Shapes]:
    """The tensors in order, a new shard begun where the next one would pass the limit."""
    shards: list[Shapes] = [{}]
    room = limit
    for name, entry in shapes.items():
        if _size(*entry) > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = entry
        room -= _size(*entry)
    return shards


def _numbers(spec: Spec, params: Params, shard: Shapes, own: Mapping[str, str]) -> Iterator[np.ndarray]:
    """The tensors of a shard in the file's layout and dtype; those of one parameter follow each other."""
    current, layers = None, {}
    for file_name, (shape, dtype) in shard.items():
        if own[file_name] != current:
            current = own[file_name]
            whole = np.asarray(jax.device_get(weights.dense(params[current])))
            layers = dict(convert.to_file(current, layout(spec)[current], whole))
        out = buffer(shape, dtype)
        copy(out, layers[file_name])
        if not finite(out):
            raise ValueError(f"{current} holds infinities or NaNs as {dtype}; nothing was saved.")
        yield out
