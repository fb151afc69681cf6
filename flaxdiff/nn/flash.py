"""Attention by the Pallas kernel of TPUs, made fit for what the rest of the library does with it.

The kernel is jax's splash attention. Here its arguments get the shapes that it wants, and it learns to live with
transformations: XLA cannot split a kernel over devices by itself, so it is told that batch and heads may be split;
`vmap` adds its axis to the batch; and the gradient runs the kernel's own backward pass, from Q, K and V alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

LANES = 128  # what the sizes of blocks are multiples of
BLOCK = 1024  # queries, and keys, that a block holds at most


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """softmax(QKᵀ)V of scaled queries, as `nn.attention.attention`; elsewhere than on a TPU the kernel is interpreted.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> attention(x, x, x).shape
    (1, 5, 2, 4)
    """
    return _attend(causal, q, k, v)


def _block(length: int) -> int:
    """The size of a block: a multiple of 128 that wastes little of the last one."""
    whole = -(-length // LANES)
    return min(range(1, BLOCK // LANES + 1), key=lambda size: (-(-whole // size) * size, -size)) * LANES


def _kernel(causal: bool, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The kernel on what one device holds, [B, N, H, D]."""
    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    rows, keys = _block(n), _block(m)
    pad = lambda a, size: jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, -a.shape[1] % size), (0, 0)))
    q, k, v = pad(q, rows), pad(k, keys), pad(v, keys)
    shape = q.shape[2], k.shape[2]
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=keys,
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
    return out[:, :, :n].swapaxes(1, 2)


def _forward(causal: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    run = functools.partial(_kernel, causal)
    return jax.lax.platform_dependent(q, k, v, tpu=functools.partial(run, False), default=functools.partial(run, True))


def _backward(causal: bool, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(functools.partial(_forward, causal), q, k, v)[1](g)


# --- transformations -------------------------------------------------------------------------------------------------


def _divisible(function, takes: str, gives: str):
    """A function of (causal, *arrays) whose batch and heads may lie on several devices, and be mapped over.

    Its arrays are [B, positions, H, D]. `takes` and `gives` say of each whether the positions are those of queries
    ("n") or of keys ("m"); each device gets all of them.
    """
    function = jax.jit(function, static_argnums=0)  # which keeps the mask's tables to itself
    split = custom_partitioning(function, static_argnums=(0,))
    spell = lambda letters: ", ".join(f"b {letter} h d" for letter in letters)

    def partition(causal, mesh, arguments, results):
        batch, _, heads, _ = (*arguments[0].sharding.spec, *[None] * 4)[:4]
        place = NamedSharding(mesh, PartitionSpec(batch, None, heads, None))
        everywhere = lambda tree: jax.tree.map(lambda array: place, tree)
        return mesh, functools.partial(function, causal), everywhere(results), everywhere(arguments)

    rule = f"{spell(takes)} -> {spell(gives)}"
    split.def_partition(partition, sharding_rule=rule, need_replication_factors=("n", "d", "m"))

    def apply(causal, *arrays):
        @jax.custom_batching.custom_vmap
        def run(*arrays):
            return split(causal, *arrays)

        @run.def_vmap
        def mapped(size, batched, *arrays):
            whole = [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(arrays, batched)]
            out = run(*(a.reshape(-1, *a.shape[2:]) for a in whole))
            apart = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out)
            return apart, jax.tree.map(lambda a: True, apart)

        return run(*arrays)

    return apply


_forward_anywhere = _divisible(_forward, takes="nmm", gives="n")
_backward_anywhere = _divisible(_backward, takes="nmmn", gives="nmm")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal, q, k, v):
    return _forward_anywhere(causal, q, k, v)


_attend.defvjp(
    lambda causal, q, k, v: (_attend(causal, q, k, v), (q, k, v)),
    lambda causal, saved, g: _backward_anywhere(causal, *saved, g),
)
