"""The one converter between a PyTorch checkpoint and our parameters, both ways, for every model.

Names agree, so a handful of rules of layout is all there is: a linear weight is [out, in] in a file and [in, out] here,
a convolution OIHW and HWIO, everything else the same, and the blocks `prefix.0.rest`, `prefix.1.rest`, … of a file may
be one array `prefix.rest` with a leading axis here; where not all of them are equal, those of a run are one array
`prefix.3-7.rest`. `core.layout` says which rule a parameter follows. `match` finds the tensors of every parameter, or
lists everything that does not fit; `read` fills a parameter from them.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flaxdiff.checkpoint.tensors import Tensor, Tensors, buffer, copy, damaged, finite, is_float
from flaxdiff.core import Leaf, Spec, layout, names_in_file

SHOWN = 12  # lines of each sort in a report


class Place(NamedTuple):
    """Where a parameter's numbers lie: one tensor, or one for each layer of a stack."""

    leaf: Leaf
    names: tuple[str, ...]  # in the file
    tensors: tuple[Tensor, ...]


def axes(kind: str, rank: int) -> tuple[int, ...]:
    """The file's axes in our order.

    >>> axes("linear", 2), axes("conv", 4), axes("norm", 1)
    ((1, 0), (2, 3, 1, 0), (0,))
    """
    match kind:
        case "linear":
            return (1, 0)
        case "conv":
            return (*range(2, rank), 1, 0)
        case _:
            return tuple(range(rank))


def shape_in_file(leaf: Leaf) -> tuple[int, ...]:
    """The shape of a parameter (of one layer of a stack) in a file."""
    shape = leaf.shape[1:] if leaf.stack else leaf.shape
    return tuple(shape[i] for i in np.argsort(axes(leaf.kind, len(shape))))


def match(spec: Spec, tensors: Tensors, source: str) -> dict[str, Place]:
    """Find the tensors of every parameter.

    Args:
      spec: the model.
      tensors: what the checkpoint holds, under its own names.
      source: where it came from, for the report.

    Returns:
      A place for each parameter, in the order of the layout.

    Raises:
      ValueError: names are missing, unexpected or doubled, or tensors have another shape or no floating-point numbers;
        all of them are listed at once.
    """
    renamed = {old: _rename(spec, old) for old in tensors if not re.fullmatch(spec.module.ignored, old)}
    found = {new: tensors[old] for old, new in renamed.items()}
    wanted = {name: leaf for own, leaf in layout(spec).items() for name in names_in_file(own, leaf)}
    faults = {
        "missing": [f"- {n} {_show(shape_in_file(leaf))}" for n, leaf in wanted.items() if n not in found],
        "unexpected": [f"+ {n} {_show(t.shape)}" for n, t in found.items() if n not in wanted],
        "misshapen": [
            f"± {n} is {_show(found[n].shape)}, the model has {_show(shape_in_file(leaf))}"
            for n, leaf in wanted.items()
            if n in found and not _same(found[n].shape, leaf)
        ],
        "not of floating point": [
            f"± {n} is {found[n].dtype}" for n in wanted if n in found and not is_float(found[n].dtype)
        ],
        "there twice": [f"± {n}" for n, count in Counter(renamed.values()).items() if count > 1],
    }
    if any(faults.values()):
        raise ValueError(_report(spec, source, faults, len(wanted)))
    places = {}
    for name, leaf in layout(spec).items():
        names = names_in_file(name, leaf)
        places[name] = Place(leaf, names, tuple(found[n] for n in names))
    return places


def _rename(spec: Spec, name: str) -> str:
    for pattern, replacement in spec.module.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _same(shape: tuple[int, ...], leaf: Leaf) -> bool:
    """Whether a file's shape will do: older files keep some linear weights as 1 x 1 convolutions, and the reverse."""
    wanted = shape_in_file(leaf)
    if leaf.kind in ("linear", "conv"):
        return shape[:2] == wanted[:2] and _trim(shape) == _trim(wanted)
    return shape == wanted


def _trim(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] + tuple(n for n in shape[2:] if n != 1)


def _show(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _report(spec: Spec, source: str, faults: dict[str, list[str]], total: int) -> str:
    counts = ", ".join(f"{len(lines)} {sort}" for sort, lines in faults.items() if lines)
    lines = [f"{source} does not fit {spec.module.__name__}: {counts} (the model has {total} tensors)."]
    for sort in faults.values():
        lines += [f"  {line}" for line in sort[:SHOWN]]
        if len(sort) > SHOWN:
            lines.append(f"  … and {len(sort) - SHOWN} more")
    lines.append(
        "The configuration and the weights belong to different models: take both from one folder, or the right class."
    )
    return "\n".join(lines)


def read(name: str, place: Place, dtype: np.dtype, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """A parameter, or the part of it that `index` selects, in our layout; a whole one is held against its checksum.

    Beside the result this keeps one tensor of the file in memory, whatever the number of layers.

    Raises:
      ValueError: there are infinities or NaNs in the file, or in the result because the dtype cannot hold a number.
    """
    leaf, checked = place.leaf, index is None
    index = tuple(range(n)[i] for n, i in zip(leaf.shape, index or (slice(None),) * len(leaf.shape)))
    out = buffer(tuple(map(len, index)), dtype)
    parts = [np.s_[i.start : i.stop : i.step] for i in index]
    if leaf.stack is None:
        _fill(out, place.names[0], place.tensors[0], leaf, parts, checked)
    else:
        for row, layer in enumerate(index[0]):
            _fill(out[row, ...], place.names[layer], place.tensors[layer], leaf, parts[1:], checked)
    return out


def _fill(out: np.ndarray, name: str, tensor: Tensor, leaf: Leaf, parts: list[slice], checked: bool) -> None:
    with tensor.view(checked) as numbers:
        ours = numbers.reshape(shape_in_file(leaf)).transpose(axes(leaf.kind, len(parts)))[(*parts, ...)]
        copy(out, ours)
        if finite(out):
            return
        if np.isfinite(ours.astype(np.float32)).all():
            raise ValueError(
                f"{tensor.file.path}: {name} has numbers too large for {out.dtype}; load with dtype=bfloat16."
            )
    raise damaged(tensor.file.path, f"{name} holds infinities or NaNs")


def to_file(name: str, leaf: Leaf, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter as a file holds it: its name, or one for each layer of a stack, and a view in the file's layout."""
    layers = weight if leaf.stack else (weight,)
    for file_name, layer in zip(names_in_file(name, leaf), layers, strict=True):
        yield file_name, layer.transpose(np.argsort(axes(leaf.kind, layer.ndim)))
