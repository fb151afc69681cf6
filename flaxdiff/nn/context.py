"""Attention on many devices, by the mesh in context: pictures, heads and tokens may lie on several.

Pictures and heads have nothing to say to each other: each device computes its own as it would alone, on whatever
backend. Where tokens are split, each answers its own queries. Up to `LONG` keys it gathers those of all others. Beyond
that the parts of the keys and values travel around the ring of devices, and each device joins what it makes of one
after another by an online softmax, so that none holds them all. The way back goes around the same ring, the gradients
of keys and values travelling with them.

Reference: Liu et al., Ring Attention with Blockwise Transformers for Near-Infinite Context, 2023.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxdiff.parallel import splits

LONG = 2**16  # keys beyond which no device gathers them all
KEYS = 1024  # in a block of scores

Axes = tuple[str, ...]


def spread(
    alone: Callable, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, wish: str | None
) -> jax.Array:
    """`alone(q, k, v, bias)`, softmax(QKᵀ + bias)V, with its work split over the mesh in context.

    Args:
      alone: attention on one device.
      q, k, v, bias: [B, N, H, D] scaled, [B, M, H, D] twice, and what broadcasts against [B, H, N, M] or None.
      wish: over which axes the queries are split, see `parallel.splits`; None for a device to have all of them.
    """
    wishes = ("batch", wish, "tensor")
    batch, tokens, heads = axes = splits(q.shape[:3], wishes)
    if not any(axes):
        return alone(q, k, v, bias)
    whole, split = PartitionSpec(batch, None, heads), PartitionSpec(*axes)
    if tokens and bias is None and k.shape[1] > LONG and splits(k.shape[:3], wishes) == axes:
        ring = lambda q, k, v: _ring(tokens, q, k, v)
        return jax.shard_map(ring, in_specs=(split,) * 3, out_specs=split, check_vma=False)(q, k, v)
    over = None
    if bias is not None:
        given = zip(bias.shape, (batch, heads, tokens, None))
        over = PartitionSpec(*(axes if size > 1 else None for size, axes in given))
    specs = (split, whole, whole, over)
    return jax.shard_map(alone, in_specs=specs, out_specs=split, check_vma=False)(q, k, v, bias)


# --- the ring --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(axes: Axes, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _around(axes, q, k, v)[0].astype(v.dtype)


def _send(axes: Axes, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    size = jax.lax.axis_size(axes)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return tuple(jax.lax.ppermute(part, axes, ring) for part in parts)


def _around(axes: Axes, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output in float32, and log Σ exp of each row of scores, [B, N, H]."""

    def join(out, total, k, v):
        more, its = _each(_part, q, k, v)
        both = jnp.logaddexp(total, its)
        return out * jnp.exp(total - both)[..., None] + more * jnp.exp(its - both)[..., None], both

    def hop(carry, _):
        out, total, k, v = carry
        return (*join(out, total, k, v), *_send(axes, (k, v))), None  # computes while it sends

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
    carry, _ = jax.lax.scan(hop, (*nothing, k, v), length=jax.lax.axis_size(axes) - 1)
    return join(*carry)


def _forward(axes: Axes, q: jax.Array, k: jax.Array, v: jax.Array):
    out, total = _around(axes, q, k, v)
    return out.astype(v.dtype), (q, k, v, out, total)


def _backward(axes: Axes, saved, g: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, total = saved
    g = g.astype(jnp.float32)
    mean = (g * out).sum(-1)

    def hop(carry, _):
        dq, k, v, dk, dv = carry
        change = _each(jax.grad(_change, (0, 1, 2)), q, k, v, total, g, mean)
        to_q, to_k, to_v = (a.astype(jnp.float32) for a in change)
        return (dq + to_q, *_send(axes, (k, v, dk + to_k, dv + to_v))), None

    like = lambda a: jnp.zeros(a.shape, jnp.float32)
    (dq, _, _, dk, dv), _ = jax.lax.scan(hop, (like(q), k, v, like(k), like(v)), length=jax.lax.axis_size(axes))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_ring.defvjp(_forward, _backward)


# --- one head, one part of the keys ----------------------------------------------------------------------------------


def _each(function: Callable, *arrays: jax.Array):
    """A function of one head of one picture, of arrays [positions, ...], for all of [B, positions, H, ...]."""
    apart = [a.swapaxes(1, 2).reshape(-1, a.shape[1], *a.shape[3:]) for a in arrays]
    out = jax.lax.map(lambda arrays: function(*arrays), tuple(apart))
    b, _, h = arrays[0].shape[:3]
    return jax.tree.map(lambda a: a.reshape(b, h, *a.shape[1:]).swapaxes(1, 2), out)


def _blocks(k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values in blocks, and which of them are there: what fills up the last block is not."""
    size = min(KEYS, len(k))
    cut = lambda a: jnp.pad(a, ((0, -len(a) % size), *[(0, 0)] * (a.ndim - 1))).reshape(-1, size, *a.shape[1:])
    return cut(k), cut(v), cut(jnp.ones(len(k), bool))


_product = functools.partial(jnp.einsum, "nd,md->nm", preferred_element_type=jnp.float32)


def _part(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean of the values under the softmax of the scores, and log Σ exp of each row."""

    def add(carry, block):
        (top, total, mean), (k, v, there) = carry, block
        scores = jnp.where(there, _product(q, k), -jnp.inf)
        higher = jnp.maximum(top, scores.max(-1))
        weight, fade = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        more = jnp.einsum("nm,md->nd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (higher, total * fade + weight.sum(-1), mean * fade[:, None] + more), None

    nothing = jnp.full(len(q), -jnp.inf), jnp.zeros(len(q)), jnp.zeros(q.shape)
    (top, total, mean), _ = jax.lax.scan(add, nothing, _blocks(k, v))
    return mean / total[:, None], top + jnp.log(total)


def _change(q, k, v, total, g, mean) -> jax.Array:
    """A number whose gradients by Q, K and V are those of the loss: Σ exp(QKᵀ - total) (gVᵀ - mean).

    Args:
      total: log Σ exp of each row over all keys [N], a constant here.
      g: the gradient of the loss by the output [N, D].
      mean: of gVᵀ under the softmax [N].
    """

    @jax.checkpoint  # scores are computed again on the way back, not kept
    def add(sum, block):
        k, v, there = block
        weight = jnp.where(there, jnp.exp(_product(q, k) - total[:, None]), 0)
        return sum + (weight * (_product(g.astype(v.dtype), v) - mean[:, None])).sum(), None

    return jax.lax.scan(add, jnp.float32(0), _blocks(k, v))[0]
