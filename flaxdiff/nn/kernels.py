"""What Pallas kernels need: to live on many devices, and heads of tokens where they want them.

XLA cannot split a kernel: each device runs its own on its part. And a layer gives tokens, in each of which lie all
heads, side by side, where attention wants heads, in each of which lie all tokens. XLA goes from one to the other in
two passes over memory, or in a product at half its speed; a kernel only says which blocks it reads and writes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from flaxdiff.parallel import free_axes, splits

WISHES = {"b": "batch", "t": "context", "h": "tensor"}  # letter -> over which axes of the mesh, see `parallel.splits`
LANES = 128  # numbers in a row of a TPU's vectors
TOKENS, HEADS = 512, 8  # of a block, as a rule


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


def as_plain(kernel: Callable, plain: Callable) -> Callable:
    """A kernel whose gradients are worked out as those of a plain function that gives the same."""
    run = jax.custom_vjp(kernel)
    run.defvjp(lambda *arrays: (kernel(*arrays), arrays), lambda arrays, g: jax.vjp(plain, *arrays)[1](g))
    return run


def by_heads(b: int, n: int, heads: int, d: int) -> tuple[tuple[int, ...], pl.BlockSpec, pl.BlockSpec]:
    """The grid (B, blocks of tokens, of heads), and the same blocks of [B, N, H · D] and of [B, H, N, D].

    Blocks of several heads begin at a multiple of LANES, or there is one for all of them.
    """
    fit = [k for k in range(1, heads + 1) if heads % k == 0 and (k * d % LANES == 0 or k == heads)]
    some = max([k for k in fit if k <= HEADS] or fit[:1])
    tokens = min(n, TOKENS * HEADS // max(some, HEADS) // LANES * LANES or LANES)
    of_tokens = pl.BlockSpec((1, tokens, some * d), lambda b, i, h: (b, i, h))
    of_heads = pl.BlockSpec((1, some, tokens, d), lambda b, i, h: (b, h, i, 0))
    return (b, pl.cdiv(n, tokens), heads // some), of_tokens, of_heads


def regrouped(x: jax.Array, first: bool, length: int, interpret: bool = False) -> jax.Array:
    """[B, N, H, D] -> [B, H, length, D], heads `first`, or back; zeros fill up missing tokens, and others are cut off.

    >>> regrouped(jnp.ones((1, 3, 2, 4)), True, 8, interpret=True).sum((2, 3)).tolist()
    [[12.0, 12.0]]
    """
    return _regrouped(first, x.shape[1 if first else 2], length, interpret, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _regrouped(first: bool, n: int, length: int, interpret: bool, x: jax.Array) -> jax.Array:
    b, heads, d = x.shape[0], x.shape[2 if first else 1], x.shape[3]
    grid, *blocks = by_heads(b, max(n, length), heads, d)
    some, tokens = blocks[1].block_shape[1:3]

    def move(x, out) -> None:
        there = pl.program_id(1) * tokens + jax.lax.broadcasted_iota(jnp.int32, (tokens, d), 0) < n
        for i in range(some):
            read, write = [(0, slice(None), slice(i * d, (i + 1) * d)), (0, i)][:: 1 if first else -1]
            out[write] = jnp.where(there, x[read], 0) if n < length else x[read]

    reads, writes = blocks if first else blocks[::-1]
    made = jax.ShapeDtypeStruct((b, heads, length, d) if first else (b, length, heads * d), x.dtype)
    cost = pl.CostEstimate(
        flops=0, bytes_accessed=x.nbytes + math.prod(made.shape) * x.dtype.itemsize, transcendentals=0
    )
    run = pl.pallas_call(
        move, made, grid=grid, in_specs=[reads], out_specs=writes, cost_estimate=cost, interpret=interpret
    )
    return run(x.reshape(b, n, heads * d)) if first else run(x).reshape(b, length, heads, d)


_regrouped.defvjp(
    lambda *args: (_regrouped(*args), None),
    lambda first, n, length, interpret, _, g: (_regrouped(not first, length, n, interpret, g),),
)
