"""What Pallas kernels need to live with transformations: to be split over devices, and mapped over."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

SPLIT = ("b", "h")  # the axes that may lie on several devices


def divisible(function: Callable, takes: Sequence[str], gives: Sequence[str] | str) -> Callable:
    """A function of (static, *arrays) whose batch and heads may lie on several devices, and be mapped over.

    XLA cannot split a kernel by itself, so it is told that these axes have nothing to say to each other; every device
    gets all of the others. `vmap` adds its axis to the batch.

    Args:
      function: of a hashable argument and arrays.
      takes, gives: the axes of each array by letters, as "b n h d", "b" being the batch and "h" heads; the first of
        those it takes says where its batch and heads lie.
    """
    function = jax.jit(function, static_argnums=0)  # which keeps tables of a kernel to itself
    split = custom_partitioning(function, static_argnums=(0,))
    letters = dict.fromkeys(letter for axes in takes for letter in axes.split())  # in the order that XLA wants
    whole = tuple(letter for letter in letters if letter not in SPLIT)

    def partition(static, mesh, arguments, results):
        first = dict(zip(takes[0].split(), (*arguments[0].sharding.spec, *[None] * 9)))
        on = lambda axes: PartitionSpec(*(first.get(letter) if letter in SPLIT else None for letter in axes.split()))
        place = lambda axes: NamedSharding(mesh, on(axes))
        out = place(gives) if isinstance(gives, str) else tuple(map(place, gives))
        return mesh, lambda *arrays: function(static, *arrays), out, tuple(map(place, takes))

    rule = f"{', '.join(takes)} -> {gives if isinstance(gives, str) else ', '.join(gives)}"
    split.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)

    def apply(static, *arrays):
        @jax.custom_batching.custom_vmap
        def run(*arrays):
            return split(static, *arrays)

        @run.def_vmap
        def mapped(size, batched, *arrays):
            spread = [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(arrays, batched)]
            has_batch = [axes.split()[0] == "b" for axes in takes]
            if any(b and not has for b, has in zip(batched, has_batch)):
                out = jax.lax.map(lambda each: run(*each), tuple(spread))
            else:
                folded = [s.reshape(-1, *s.shape[2:]) if has else a for s, a, has in zip(spread, arrays, has_batch)]
                out = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), run(*folded))
            return out, jax.tree.map(lambda a: True, out)

        return run(*arrays)

    return apply
