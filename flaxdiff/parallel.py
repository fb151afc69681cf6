"""Many devices: a mesh, and rules by path that say where each parameter lies.

A rule is a pair (regex, choice), and the first that matches a parameter's name wins; the same helper, `first_match`,
serves sharding, freezing, learning rates and every other choice by name. With parameters and inputs in place, the same
`jax.jit(pipe.generate)` runs on one device or on all: XLA inserts the communication. For `jax.pmap`, `replicate` and
`shard` add the leading axis of devices.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxdiff.core import Params
from flaxdiff.schedulers import Plan

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


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over devices with named axes; by default all of them along "data".

    Args:
      shape: axis -> size, e.g. {"data": 2, "fsdp": 4}.
      devices: by default all, of all hosts.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.

    >>> make_mesh({"data": 1}, jax.devices()[:1]).axis_names
    ('data',)
    """
    devices = jax.devices() if devices is None else devices
    shape = {"data": len(devices)} if shape is None else shape
    if np.prod(list(shape.values())) != len(devices):
        raise ValueError(
            f"A mesh of {dict(shape)} does not hold {len(devices)} devices; the sizes must multiply to that."
        )
    return Mesh(np.asarray(devices).reshape(*shape.values()), tuple(shape))


def whole(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """A copy on every device."""
    return PartitionSpec()


def largest(axis: str) -> Choice:
    """Split the longest dimension that the mesh axis divides; a copy where there is none."""

    def choose(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        divisible = [d for d in range(len(shape)) if axis in mesh.shape and shape[d] % mesh.shape[axis] == 0]
        if not divisible:
            return PartitionSpec()
        best = max(divisible, key=lambda d: shape[d])
        return PartitionSpec(*(axis if d == best else None for d in range(len(shape))))

    return choose


# Weights split over "fsdp", gathered by XLA where they are used; small vectors copied.
FSDP: Rules = ((r"bias$|norm", whole), (r"", largest("fsdp")))
REPLICATED: Rules = ((r"", whole),)


def shardings(params: Mapping[str, Any], mesh: Mesh, rules: Rules = FSDP) -> dict[str, Any]:
    """Where each parameter lies, for `jax.device_put`, `jax.jit(init, out_shardings=…)` or a loader.

    Args:
      params: name -> array, abstract array, or another kind of weight; or component -> such a dictionary.
      mesh: the devices.
      rules: (regex, choice), first match wins.

    >>> mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    >>> tuple(shardings({"proj.weight": jnp.zeros((4, 8))}, mesh)["proj.weight"].spec)
    (None, 'fsdp')
    """
    if all(isinstance(value, Mapping) for value in params.values()):
        return {component: shardings(values, mesh, rules) for component, values in params.items()}
    place = lambda name: lambda leaf: NamedSharding(mesh, first_match(rules, name)(leaf.shape, mesh))
    return {name: jax.tree.map(place(name), weight) for name, weight in params.items()}


def distribute(params: Params, mesh: Mesh, rules: Rules = FSDP) -> Params:
    """Parameters put where the rules say."""
    return jax.device_put(params, shardings(params, mesh, rules))


# --- inputs ----------------------------------------------------------------------------------------------------------


def _by_kind(shared: Callable, batched: Callable, tree: Any) -> Any:
    """Map numbers and a scheduler's tables, the same for all images, by one function, and all else by another."""
    is_plan = lambda node: isinstance(node, Plan)
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


def shard(inputs: Any, over: Mesh | int | None = None) -> Any:
    """Split a batch over devices.

    Args:
      inputs: from `prepare_inputs`, or any tree of arrays whose first axis is the batch. Numbers and a scheduler's
        plan are the same for all.
      over: a mesh, for `jax.jit`: arrays are placed, split along all its axes; or a number of devices (by default the
        local ones), for `jax.pmap`: arrays get a leading axis of devices.

    Raises:
      ValueError: the batch does not divide.

    >>> shard({"ids": np.zeros((4, 7)), "scale": np.float32(5)}, 2)["ids"].shape
    (2, 2, 7)
    """
    n = over.size if isinstance(over, Mesh) else over or jax.local_device_count()

    def check(a: Any) -> Any:
        if len(a) % n:
            raise ValueError(f"A batch of {len(a)} does not divide among {n} devices; use a multiple of {n}.")
        return a

    if isinstance(over, Mesh):
        everywhere, split = NamedSharding(over, PartitionSpec()), NamedSharding(over, PartitionSpec(over.axis_names))
        put = lambda a, where: jax.device_put(a, where)
        return _by_kind(lambda a: put(a, everywhere), lambda a: put(check(a), split), inputs)
    copies = lambda a: np.broadcast_to(a, (n, *np.shape(a)))
    return _by_kind(copies, lambda a: check(a).reshape(n, len(a) // n, *a.shape[1:]), inputs)
