"""Attention by the Pallas kernel of TPUs, made fit for what the rest of the library does with it.

The kernel is jax's splash attention. Here its arguments get the shapes that it wants, and it learns to live on
many devices: see kernels.py; and the gradient runs the kernel's own backward pass, from Q, K and V alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from flaxdiff.nn.kernels import LANES, divisible, regrouped

# Queries, and keys, that a block holds at most, in heads of up to LANES channels and in wider ones; sizes are multiples
# of LANES. Of a block's keys so many meet its queries at once. That fits into 6 MB of fast memory; gradients want more.
BLOCK = 1024, 512
AT_ONCE = 256


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """softmax(QKᵀ)V of scaled queries, as `nn.attention.attention`; elsewhere than on a TPU the kernel is interpreted.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> attention(x, x, x).shape
    (1, 5, 2, 4)
    """
    return _attend(causal, q, k, v)


def _block(length: int, channels: int) -> int:
    """The size of a block: a multiple of 128 that wastes little of the last one."""
    whole, most = -(-length // LANES), BLOCK[channels > LANES]
    return min(range(1, most // LANES + 1), key=lambda size: (-(-whole // size) * size, -size)) * LANES


def _kernel(causal: bool, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The kernel on what one device holds, [B, N, H, D]."""
    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    rows, keys = _block(n, q.shape[3]), _block(m, q.shape[3])
    moved = lambda a, size: regrouped(a, True, -(-a.shape[1] // size) * size, interpret)
    # those of LANES channels were turned by a kernel that has put heads first already: see rope.py
    turned = lambda a, size: jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, -a.shape[1] % size), (0, 0)))
    first = turned if q.shape[-1] == LANES else moved
    q, k, v = first(q, rows), first(k, keys), moved(v, keys)
    shape = q.shape[2], k.shape[2]
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=keys,
        block_kv_compute=keys if keys % AT_ONCE else AT_ONCE,
        block_q_dkv=rows,
        block_kv_dkv=keys,
        block_q_dq=rows,
        block_kv_dq=keys,
    )
    run = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if shape[1] != m:  # the keys that fill up the last block belong to nobody
        segments = splash.SegmentIds(jnp.zeros(shape[0], jnp.int32), (jnp.arange(shape[1]) >= m).astype(jnp.int32))
    out = jax.vmap(lambda q, k, v: run(q, k, v, segment_ids=segments))(q, k, v)
    return regrouped(out, False, n, interpret)


def _forward(causal: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    run = functools.partial(_kernel, causal)
    return jax.lax.platform_dependent(q, k, v, tpu=functools.partial(run, False), default=functools.partial(run, True))


def _backward(causal: bool, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(functools.partial(_forward, causal), q, k, v)[1](g)


@functools.cache
def _apart(function: Callable, causal: bool) -> Callable:
    """Compiled apart, once for all layers, which keeps tables of the kernel to itself."""
    return jax.jit(functools.partial(function, causal))


def _anywhere(function: Callable, causal: bool, *arrays: jax.Array) -> Any:
    """Either of these, with pictures and heads on several devices; Q and its gradient have "n" places, the rest "m"."""
    q, kv = "b n h d", "b m h d"
    return divisible(
        _apart(function, causal), [q, kv, kv, q][: len(arrays)], q if function is _forward else (q, kv, kv)
    )(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal, q, k, v):
    return _anywhere(_forward, causal, q, k, v)


_attend.defvjp(
    lambda causal, q, k, v: (_attend(causal, q, k, v), (q, k, v)),
    lambda causal, saved, g: _anywhere(_backward, causal, *saved, g),
)
