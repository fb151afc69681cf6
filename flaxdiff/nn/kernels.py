"""What Pallas kernels need to live on many devices: XLA cannot split them, so each device runs its own on its part."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from flaxdiff.parallel import free_axes, splits

WISHES = {"b": "batch", "t": "context", "h": "tensor"}  # letter -> over which axes of the mesh, see `parallel.splits`


def divisible(function: Callable, takes: Sequence[str], gives: Sequence[str] | str) -> Callable:
    """A function of arrays whose pictures, tokens or heads may lie on several devices of the mesh in context.

    Args:
      function: of arrays; of these axes, parts have nothing to say to each other.
      takes, gives: the axes of each array by letters, as "b t h d": pictures, tokens, heads, and others, of which every
        device gets all. The first of those it takes says what divides.

    >>> import jax.numpy as jnp
    >>> divisible(lambda x, w: x * w, ["b t d", "d"], "b t d")(jnp.ones((2, 3, 4)), jnp.ones(4)).shape
    (2, 3, 4)
    """

    def apply(*arrays: jax.Array) -> Any:
        if not free_axes():
            return function(*arrays)
        letters = takes[0].split()
        over = dict(zip(letters, splits(arrays[0].shape, [WISHES.get(letter) for letter in letters])))
        place = lambda axes: PartitionSpec(*(over.get(letter) or None for letter in axes.split()))
        out = place(gives) if isinstance(gives, str) else tuple(map(place, gives))
        return jax.shard_map(function, in_specs=tuple(map(place, takes)), out_specs=out, check_vma=False)(*arrays)

    return apply
