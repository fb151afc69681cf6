"""Many devices: a mesh, and rules by path that say where each parameter lies.

A rule is a pair (regex, choice), and the first that matches a parameter's name wins; the same helper, `first_match`,
serves sharding, freezing, learning rates and every other choice by name. With parameters and inputs in place, the same
`jax.jit(pipe.generate)` runs on one device or, with the mesh in context, on all: XLA inserts the communication. For
`jax.pmap`, `replicate` and `shard` add the leading axis of devices.

A mesh has up to four axes. The batch is split over "data" and "fsdp", weights over "fsdp" (gathered where they are
used) and "tensor" (each device computes a part of a layer's channels), tokens and the rows of pictures over "context".
`RULES` and `constrain` know all four and pass over axes that a mesh does not have, so a `preset` is no more than the
sizes of the axes. `start` joins the processes of many hosts, whose devices then make one mesh.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxdiff.core import Params

Choice = Callable[[tuple[int, ...], Mesh], PartitionSpec]
Rules = Sequence[tuple[str, Any]]


def first_match(rules: Rules, name: str) -> Any:
    """The choice of the first rule whose regex is found in the name.

    Raises:
      ValueError: no rule matches.

    >>> first_match([(r"bias$", "small"), (r"", "rest")], "conv_in.bias")
    'small'
    """
    for pattern, choice in rules:
        if re.search(pattern, name):
            return choice
    raise ValueError(
        f"No rule matches {name!r}; end the list with ('', …). Rules: {[pattern for pattern, _ in rules]}."
    )


def make_mesh(shape: Mapping[str, int] | str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over devices with named axes; by default all of them along "data".

    Args:
      shape: axis -> size, e.g. {"data": 2, "fsdp": 4}; or a `preset`, e.g. "fsdp+cp=4".
      devices: by default all, of all hosts.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or there is no such preset.

    >>> make_mesh("fsdp", jax.devices()[:1]).axis_names
    ('fsdp',)
    """
    devices = jax.devices() if devices is None else devices
    if isinstance(shape, str):
        shape = preset(shape, len(devices))
    shape = {"data": len(devices)} if shape is None else shape
    if np.prod(list(shape.values())) != len(devices):
        raise ValueError(
            f"A mesh of {dict(shape)} does not hold {len(devices)} devices; the sizes must multiply to that."
        )
    return Mesh(np.asarray(devices).reshape(*shape.values()), tuple(shape), (AxisType.Auto,) * len(shape))


def whole(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """A copy on every device."""
    return PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Split:
    """Split dimensions over axes of the mesh: axis -> dimension counted from the end, or None for the longest.

    An axis that the mesh lacks is passed over, and so is one that does not divide the dimension or finds it taken.

    >>> tuple(Split({"tensor": -1, "fsdp": None})((320, 640), make_mesh({"fsdp": 1}, jax.devices()[:1])))
    (None, 'fsdp')
    """

    wishes: Mapping[str, int | None]

    def __call__(self, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        axes: list[str | None] = [None] * len(shape)
        for axis, wish in self.wishes.items():
            dims = range(len(shape)) if wish is None else [len(shape) + wish] if len(shape) + wish >= 0 else []
            free = [d for d in dims if axis in mesh.shape and axes[d] is None and shape[d] % mesh.shape[axis] == 0]
            if free:  # of equal ones the last, which for most weights lies in one piece in a file
                axes[max(free, key=lambda d: (shape[d], d))] = axis
        return PartitionSpec(*axes)


# What an autoencoder is made of: its attention has one head, which is not worth splitting.
_VAE = r"(^|\.)(en|de)coder\.(?!layers?\.|block\.)"
# The first layer of a pair computes a part of the channels on each device, the second adds the parts up.
_FIRST = r"(to_[qkv]|[qkv]_proj|query|key|value|SelfAttention\.[qkv]|gate_proj|up_proj|proj_mlp|fc1|wi(_\d)?|"
_FIRST += r"ff(_context)?\.net\.0\.proj|intermediate(_query)?\.dense|norm1?(_context)?\.linear|"
_FIRST += r"token_embedding|embed_tokens|shared|resnets\.\d+\.(conv1|time_emb_proj))\."
_SECOND = r"(to_out\.0|to_add_out|out_proj|o_proj|SelfAttention\.o|down_proj|fc2|wo|"
_SECOND += r"ff(_context)?\.net\.2|output(_query)?\.dense|resnets\.\d+\.conv2)\.weight"
RULES: Rules = (
    (rf"norm\w*\.(weight|bias)$|{_VAE}.*bias$", whole),
    (_VAE, Split({"fsdp": None})),
    (rf"{_FIRST}bias$", Split({"tensor": -1})),
    (
        rf"bias$|{_SECOND}(\.base)*\.(scale|magnitude)$",
        whole,
    ),  # scales of 8 bits and DoRA's magnitudes have no side of inputs
    (_FIRST, Split({"tensor": -1, "fsdp": None})),
    (_SECOND, Split({"tensor": -2, "fsdp": None})),
    (r"", Split({"fsdp": None})),
)


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Where each parameter lies, for `jax.device_put`, `jax.jit(init, out_shardings=…)` or a loader.

    Args:
      tree: name -> array, abstract array, or another kind of weight; component -> such a dictionary; or a training
        state, whose moments and averages carry the names of the parameters.
      mesh: the devices.
      rules: (regex, choice), first match wins.

    >>> mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    >>> tuple(shardings({"proj.weight": jnp.zeros((4, 8))}, mesh)["proj.weight"].spec)
    (None, 'fsdp')
    """
    place = lambda path, leaf: NamedSharding(mesh, first_match(rules, _name(path))(leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(place, tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def distribute(params: Params, mesh: Mesh, rules: Rules = RULES) -> Params:
    """Parameters put where the rules say; a log line tells which ones an axis does not divide."""
    for note in notes(params, mesh, rules):
        tell(note)
    return jax.device_put(params, shardings(params, mesh, rules))


def unmet(params: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> dict[str, list[str]]:
    """Which parameters a rule would split over an axis of the mesh that does not divide them: axis -> paths.

    >>> mesh = make_mesh({"tensor": 1}, jax.devices()[:1])
    >>> unmet({"attn1.to_q.weight": jnp.zeros((5, 5))}, mesh)
    {}
    """
    found: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        choice = first_match(rules, _name(path))
        for axis in getattr(choice, "wishes", ()):
            if mesh.shape.get(axis, 1) > 1 and axis not in choice(leaf.shape, mesh):
                found.setdefault(axis, []).append(_name(path))
    return found


def notes(params: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES) -> list[str]:
    """What `unmet` finds, in sentences."""
    return [
        f"{mesh.shape[axis]} divides no side of these, not split over {axis}: {len(names)}, e.g. {names[0]}."
        for axis, names in unmet(params, mesh, rules).items()
    ]


tell = functools.cache(logging.getLogger(__name__).warning)  # the same thing once


# --- presets ---------------------------------------------------------------------------------------------------------

AXES = {"dp": "data", "fsdp": "fsdp", "tp": "tensor", "cp": "context"}


def preset(text: str, devices: int) -> dict[str, int]:
    """The shape of the mesh that a short name stands for.

    Args:
      text: "dp" (copies of the weights), "fsdp", "tp" or "cp", or a product such as "dp+fsdp" or "fsdp+cp=4". Axes
        without a size share what is left, the later ones taking the larger part.
      devices: how many there are.

    Raises:
      ValueError: an unknown name, or sizes that do not multiply to the number of devices.

    >>> preset("dp+fsdp", 8), preset("fsdp+tp=2", 8)
    ({'data': 2, 'fsdp': 4}, {'fsdp': 4, 'tensor': 2})
    """
    known = f"Join {', '.join(AXES)} by +, each once, with a size where wanted, e.g. fsdp+tp=4"
    sizes: dict[str, int | None] = {}
    for part in text.split("+"):
        name, _, size = part.partition("=")
        if name not in AXES or AXES[name] in sizes or (size and not re.fullmatch(r"[1-9]\d*", size)):
            raise ValueError(f"Preset {text!r}: {part!r} is not known. {known}.")
        sizes[AXES[name]] = int(size) if size else None

    given = math.prod(size for size in sizes.values() if size)
    left = devices // given
    open_axes = [axis for axis, size in sizes.items() if size is None]
    if devices % given or (left > 1 and not open_axes):
        hint = f"use sizes whose product {'divides' if open_axes else 'is'} {devices}"
        raise ValueError(f"Preset {text!r} needs {given} devices or a multiple, of {devices} that there are; {hint}.")
    for i, axis in enumerate(reversed(open_axes)):
        root = left ** (1 / (len(open_axes) - i))
        sizes[axis] = min(d for d in range(1, left + 1) if left % d == 0 and d > root - 1e-9)
        left //= sizes[axis]
    return {axis: size or 1 for axis, size in sizes.items()}


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that a batch is split over: all but those that split layers, or a single picture.

    >>> batch_axes(make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    ('fsdp',)
    """
    return tuple(axis for axis in mesh.axis_names if axis not in ("tensor", "context"))


# --- activations, by the mesh in context -----------------------------------------------------------------------------


def free_axes() -> dict[str, int]:
    """The axes of the mesh in context that XLA may split over; those of a shard_map are the function's own affair."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.shape.items(), mesh.axis_types)
    return {axis: size for (axis, size), kind in types if size > 1 and kind == AxisType.Auto}


def splits(shape: tuple[int, ...], wishes: Sequence[str | None]) -> tuple[tuple[str, ...], ...]:
    """For each dimension, the axes of the mesh in context that it can be split over.

    Args:
      shape: of an array.
      wishes: for each dimension an axis of the mesh; "batch" for its `batch_axes`; "rest" for these and "context", for
        "context" alone where layers are split as well; "whole" or None for none. An axis that is missing, taken or does
        not divide is passed over.

    >>> splits((8, 4), ("batch", "rest"))  # no mesh in context
    ((), ())
    """
    free, batch = free_axes(), batch_axes(jax.sharding.get_abstract_mesh())
    known = {"batch": batch, "rest": ("context",) if "tensor" in free else (*batch, "context")}
    found = []
    for length, wish in zip(shape, wishes):
        axes: list[str] = []
        for axis in known.get(wish, (wish,)):
            if axis in free and length % free[axis] == 0:
                length //= free.pop(axis)
                axes.append(axis)
        found.append(tuple(axes))
    return tuple(found)


def constrain(x: jax.Array, *wishes: str | None) -> jax.Array:
    """x itself, split over the mesh in context (`with jax.set_mesh(mesh)`) as far as `wishes` can be met, see `splits`.

    XLA decides on dimensions that nothing splits, unless "whole" is wished for, and on all where there is no mesh.

    >>> with jax.set_mesh(make_mesh({"data": 1}, jax.devices()[:1])):
    ...     constrain(jnp.zeros((2, 4, 4, 3)), "batch", "rest").shape
    (2, 4, 4, 3)
    """
    axes = splits(x.shape, wishes)
    if not any(axes) and not ("whole" in wishes and free_axes()):
        return x
    open_ = PartitionSpec.UNCONSTRAINED
    dims = [a or (None if wish == "whole" else open_) for a, wish in zip(axes, wishes)]
    return _laid(x, PartitionSpec(*dims, *[open_] * (x.ndim - len(dims))))


def gathered(weight: jax.Array) -> jax.Array:
    """The weight of a convolution, whole on every device where the mesh in context may split the rows of pictures.

    XLA gives wrong numbers where both rows and weights are split, and wrong gradients where rows and channels are.

    Raises:
      ValueError: the mesh splits rows as well as channels.
    """
    free = free_axes()
    if {"tensor", "context"} <= set(free):
        raise ValueError(
            f"Convolutions cannot be split over tensor and context at once: {free}; use fsdp+tp or fsdp+cp."
        )
    return weight if "tensor" in free else constrain(weight, *["whole"] * weight.ndim)


# outside of a compiled function too
_laid = jax.jit(jax.lax.with_sharding_constraint, static_argnums=1, inline=True)


# --- inputs ----------------------------------------------------------------------------------------------------------


def by_kind(shared: Callable, batched: Callable, tree: Any) -> Any:
    """Map numbers and a scheduler's tables, the same for all images, by one function, and all else by another."""
    is_plan = lambda node: hasattr(node, "advance")
    leaf = lambda a: (batched if np.ndim(a) else shared)(a)
    return jax.tree.map(lambda node: jax.tree.map(shared, node) if is_plan(node) else leaf(node), tree, is_leaf=is_plan)


def replicate(tree: Any, over: Mesh | int | None = None) -> Any:
    """A copy of every array on each device.

    Args:
      tree: parameters, or a key.
      over: a mesh, for `jax.jit`; or a number of devices (by default the local ones), for `jax.pmap`: arrays get a
        leading axis of devices.

    >>> replicate({"bias": jnp.zeros(3)}, 2)["bias"].shape
    (2, 3)
    """
    if isinstance(over, Mesh):
        return jax.device_put(tree, NamedSharding(over, PartitionSpec()))
    n = over or jax.local_device_count()
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *jnp.shape(a))), tree)


def shard(inputs: Any, over: Mesh | int | None = None, *, part: bool = False) -> Any:
    """Split a batch over devices.

    Args:
      inputs: from `prepare_inputs`, or any tree of arrays whose first axis is the batch. Numbers and a scheduler's
        plan are the same for all.
      over: a mesh, for `jax.jit`: arrays are placed, split along its `batch_axes`; or a number of devices (by default
        the local ones), for `jax.pmap`: arrays get a leading axis of devices.
      part: of a mesh of several processes, whether each gives its own part of the batch, as when each reads its own
        data. Otherwise all give the same whole batch, and each puts what its devices hold.

    Raises:
      ValueError: the batch does not divide.

    >>> shard({"ids": np.zeros((4, 7)), "scale": np.float32(5)}, 2)["ids"].shape
    (2, 2, 7)
    """
    if isinstance(over, Mesh):
        everywhere, split = NamedSharding(over, PartitionSpec()), NamedSharding(over, PartitionSpec(batch_axes(over)))
        n = math.prod(over.shape[axis] for axis in batch_axes(over))
        n = len({str(rows) for rows in split.addressable_devices_indices_map((n,)).values()}) if part else n
        put = jax.make_array_from_process_local_data if part else lambda where, a: jax.device_put(a, where)
        return by_kind(lambda a: put(everywhere, a), lambda a: put(split, _divisible(a, n)), inputs)
    n = over or jax.local_device_count()
    copies = lambda a: np.broadcast_to(a, (n, *np.shape(a)))
    return by_kind(copies, lambda a: _divisible(a, n).reshape(n, len(a) // n, *a.shape[1:]), inputs)


def _divisible(a: Any, n: int) -> Any:
    if len(a) % n:
        raise ValueError(f"A batch of {len(a)} does not divide among {n} devices; use a multiple of {n}.")
    return a


@contextlib.contextmanager
def among(params: Any) -> Iterator[None]:
    """With the mesh in context that parameters lie on, where they lie on several devices and none is in context."""
    of = (getattr(a, "sharding", None) for a in jax.tree.leaves(params))
    mesh = next((s.mesh for s in of if isinstance(s, NamedSharding) and s.mesh.size > 1), None)
    with jax.set_mesh(mesh) if mesh and jax.sharding.get_abstract_mesh().empty else contextlib.nullcontext():
        yield


def collected(tree: Any) -> Any:
    """The same arrays; those that lie on several hosts as NumPy's, whole on each. All of the hosts have to ask.

    >>> collected({"bias": jnp.zeros(3)})["bias"].shape
    (3,)
    """
    own = lambda a: getattr(a, "is_fully_addressable", True)
    return jax.tree.map(lambda a: a if own(a) else process_allgather(a, tiled=True), tree)


# --- many hosts ------------------------------------------------------------------------------------------------------

PLACE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
    """Join the processes of many hosts into one: call it first, in each; after it `jax.devices()` are those of all.

    Where JAX knows the surroundings by itself (TPU pods, also on GKE, SLURM, Open MPI) there is nothing to say.
    Elsewhere three environment variables tell each process its place: JAX_COORDINATOR_ADDRESS, host and port of the
    first process; JAX_NUM_PROCESSES; and JAX_PROCESS_ID, from 0 on. On a single machine, and when called again, nothing
    happens.

    Raises:
      ValueError: some of the variables are set and others not, or not to numbers.
    """
    if jax.distributed.is_initialized():
        return
    told = {name: os.environ[name] for name in PLACE if os.environ.get(name)}
    if not told:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if "coordinator_address" not in str(error):  # which JAX misses where it knows of no other processes
                raise
        return
    if len(told) < len(PLACE) or not all(told[name].isdecimal() for name in PLACE[1:]):
        raise ValueError(f"The environment has {told}; set {', '.join(PLACE)} (host:port and two numbers), or none.")
    address, count, number = told.values()
    jax.distributed.initialize(address, int(count), int(number))
