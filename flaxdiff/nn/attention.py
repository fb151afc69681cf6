"""Scaled dot-product attention, and the multi-head layer of the Stable Diffusion families.

`attention` is the one place that decides how softmax(QKᵀ/√d + bias)V is computed. "plain" materialises the scores.
"sliced" walks over heads, blocks of queries and blocks of keys with an online softmax, so that the scores never take
more than one block of memory. "flash" is the TPU's Pallas kernel, "cudnn" the GPU's. "auto" is plain while the scores
are small, and beyond that what suits the platform that the program is lowered for. The choice is
`spec.config.attention`, set for every layer at once by `apply`.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import attention_backend, setting_of, watched
from flaxdiff.nn import context, flash
from flaxdiff.nn.layers import GroupNorm, Linear
from flaxdiff.nn.perturb import beside_first, blurred, rows
from flaxdiff.nn.reusing import reused

ROWS, KEYS = 2048, 512  # of a block of scores at most: a CPU lays out keys for each block of rows anew
LARGE = 2**22  # scores (batch x heads x queries x keys) beyond which "auto" does not materialise them
# Keys up to which a row of scores is short, so that attention to a text is best done plainly on a TPU: without a bias,
# and with one, which the kernel there does not know.
FEW = 256, 512
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score that no other comes near, and no infinity to subtract
KeysValues = tuple[jax.Array, jax.Array]
BACKENDS = ("auto", "plain", "sliced", "flash", "cudnn")

# Files older than diffusers 0.12 name the attention between convolutions after its parts.
RENAMES = tuple(
    (rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
)


@contextlib.contextmanager
def seen() -> Iterator[list[tuple[jax.Array, jax.Array]]]:
    """Within this context, the scaled queries [B, N, H, D] and the keys [B, M, H, D] of each attention, in order.

    They are values of the trace at hand, so a loss may read them; blocks run one by one and not in a scan.

    >>> with seen() as pairs:
    ...     _ = attention(*[jnp.ones((1, 5, 2, 4))] * 3)
    >>> [k.shape for q, k in pairs]
    [(1, 5, 2, 4)]
    """
    with setting_of(watched, []) as pairs:
        yield pairs


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    cap: float | None = None,
    split: str = "context",
) -> jax.Array:
    """softmax(scale QKᵀ + bias)V over the keys that may be seen, softmax in float32.

    Args:
      q: queries [B, N, H, D].
      k, v: keys and values [B, M, H, D].
      mask: bool, broadcasts against the scores [B, H, N, M]: where a key may be seen. A query that sees none gets the
        mean of all values.
      bias: broadcasts against the scores, added to them.
      causal: whether position n sees only positions up to n.
      scale: of the scores; 1/√D if None.
      cap: a bound that scores s approach, as cap · tanh(s / cap).
      split: over which axes of the mesh in context the queries are split, see `parallel.splits` and nn/context.py.
        Causal attention is not: a device that has a part of the positions does not know which come before.

    Raises:
      ValueError: an unknown backend, or one that cannot do what is asked.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> attention(x, x, x, mask=jnp.arange(5) < 3).shape
    (1, 5, 2, 4)

    Reference: Vaswani et al., Attention Is All You Need, 2017; in blocks: Rabe and Staats, Self-attention Does Not Need
    O(n²) Memory, 2021; Dao et al., FlashAttention, 2022.
    """
    backend = attention_backend.get()
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r} is not known; use one of {BACKENDS}.")
    q = q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    if (pairs := watched.get()) is not None:
        pairs.append((q, k))
    if mask is not None:
        bias = jnp.where(mask, 0 if bias is None else bias.astype(jnp.float32), MASKED)
    if bias is not None:
        bias = bias.astype(jnp.float32).reshape((1,) * (4 - bias.ndim) + bias.shape)
    alone = functools.partial(_alone, backend, causal, cap)
    return context.spread(alone, q, k, v, bias, None if causal else split)


def _alone(
    backend: str,
    causal: bool,
    cap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """Attention of scaled queries on one device, or on many as XLA sees fit."""
    (b, n, h, d), m = q.shape, k.shape[1]
    kernel = functools.partial(flash.attention, causal=causal)
    if cap is not None and backend in ("flash", "cudnn"):
        raise ValueError(f"attention={backend!r} knows no bound of scores; use 'auto', 'plain' or 'sliced'.")
    if backend == "flash":
        if bias is not None:
            raise ValueError("attention='flash' knows neither masks nor biases; use 'auto', 'plain' or 'sliced'.")
        return kernel(q, k, v)
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal, scale=1.0, implementation="cudnn")
    plain, sliced = (functools.partial(way, causal=causal, cap=cap) for way in (_plain, _sliced))
    if backend == "plain" or backend == "auto" and b * h * n * m <= LARGE:
        return plain(q, k, v, bias)
    if backend == "sliced" or cap is not None:
        return sliced(q, k, v, bias)
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and d <= 128 and d % 8 == 0:
        return jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal, scale=1.0, implementation="cudnn")
    on_tpu = plain if m <= FEW[bias is not None] else sliced if bias is not None else lambda q, k, v, _: kernel(q, k, v)
    return jax.lax.platform_dependent(q, k, v, bias, tpu=on_tpu, default=sliced)


def _plain(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, causal: bool, cap: float | None
) -> jax.Array:
    scores = _bounded(jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32), cap)
    scores = scores if bias is None else scores + bias
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, MASKED)
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores).astype(v.dtype), v)


def _bounded(scores: jax.Array, cap: float | None) -> jax.Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _sliced(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, causal: bool, cap: float | None
) -> jax.Array:
    (b, n, h, d), m = q.shape, k.shape[1]
    rows, keys = _block(n, ROWS), _block(m, KEYS)
    over_n, over_m = -n % rows, -m % keys

    # one head of one picture at a time, in whole blocks; what fills up the last block of keys is masked
    blocks = lambda a, size: jnp.pad(
        a.swapaxes(1, 2).reshape(b * h, -1, d), ((0, 0), (0, -a.shape[1] % size), (0, 0))
    ).reshape(b * h, -1, size, d)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (b, h, *bias.shape[2:])).reshape(b * h, *bias.shape[2:])
        bias = jnp.broadcast_to(bias, (b * h, bias.shape[1], m))
        bias = jnp.pad(bias, ((0, 0), (0, over_n if bias.shape[1] > 1 else 0), (0, over_m)))

    def head(args):
        q, k, v, bias = args  # [I, rows, D], [J, keys, D] twice, and [N or 1, M]

        def block(i):
            @jax.checkpoint  # scores are computed again on the way back, not kept
            def add(carry, j):
                top, total, mean = carry
                scores = _bounded(jnp.einsum("nd,md->nm", q[i], k[j], preferred_element_type=jnp.float32), cap)
                row, key = i * rows + jnp.arange(rows)[:, None], j * keys + jnp.arange(keys)
                if bias is not None:
                    start = (i * rows if bias.shape[0] > 1 else 0, j * keys)
                    scores += jax.lax.dynamic_slice(bias, start, (min(bias.shape[0], rows), keys))
                if causal:
                    scores = jnp.where(key <= row, scores, MASKED)
                if over_m:
                    scores = jnp.where(key < m, scores, -jnp.inf)
                higher = jnp.maximum(top, scores.max(-1))
                weight, fade = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
                more = jnp.einsum("nm,md->nd", weight.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
                return (higher, total * fade + weight.sum(-1), mean * fade[:, None] + more), None

            nothing = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((rows, d))
            (_, total, mean), _ = add(nothing, 0) if len(k) == 1 else jax.lax.scan(add, nothing, jnp.arange(len(k)))
            return (mean / total[:, None]).astype(v.dtype)

        return jax.lax.map(block, jnp.arange(len(q)))

    out = jax.lax.map(head, (blocks(q, rows), blocks(k, keys), blocks(v, keys), bias))
    return out.reshape(b, h, -1, d)[:, :, :n].swapaxes(1, 2)


def _block(length: int, most: int) -> int:
    """How long a block is, at most so long, when as few as possible leave little over.

    >>> _block(77, 512), _block(513, 512), _block(2304, 2048)
    (77, 272, 1152)
    """
    blocks = -(-length // most)
    return length if blocks == 1 else 16 * -(-length // (16 * blocks))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Queries, keys or values as a product gives them, [B, N, H · D] -> [B, N, H, D].

    >>> split_heads(jnp.ones((1, 5, 8)), 2).shape
    (1, 5, 2, 4)
    """
    # Else a TPU's product writes heads in front of tokens itself, at half the speed, and copies its weights first.
    return jax.lax.optimization_barrier(x).reshape(*x.shape[:2], heads, -1)


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves or to a context, with diffusers' names.

    Args:
      width: channels of the tokens.
      heads, head_dim: their number and size.
      context: channels of the context; None for self-attention.
      bias: whether queries, keys and values have one; `out_bias`: the result.
      groups, eps: normalise the tokens in groups first, and add the result to the input (autoencoders, UNet2DModel).
      split: see `attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        context: int | None = None,
        bias: bool = False,
        groups: int | None = None,
        eps: float = 1e-6,
        split: str = "context",
        out_bias: bool = True,
    ):
        inner = heads * head_dim
        self.group_norm = None if groups is None else GroupNorm(width, groups, eps)
        self.to_q = Linear(width, inner, bias)
        self.to_k = Linear(context or width, inner, bias)
        self.to_v = Linear(context or width, inner, bias)
        self.to_out = nnx.List([Linear(inner, width, out_bias)])
        self.heads, self.split = heads, split

    def keys_values(self, context: jax.Array) -> KeysValues:
        """What queries meet, [B, M, C] each: of a context that stays the same, enough to work out once."""
        return self.to_k(context), self.to_v(context)

    def __call__(
        self,
        x: jax.Array,
        context: tuple[Any, ...] | None = None,
        perturb: Mapping[str, jax.Array] = MappingProxyType({}),
        sides: tuple[int, int] | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """[B, N, C], or [B, H, W, C] when normalised in groups, to itself or to `keys_values` -> the shape of x.

        Behind the keys and values may be others, (k, v, weight [B, 1 or N]): what they give is added, so weighted.
        `perturb` hinders attention to itself, see nn/perturb.py, of tokens that fill so many rows and columns. `mask`
        as of `attention`.
        """
        return reused("spatial" if context is None else "cross", lambda: self._attend(x, context, perturb, sides, mask))

    def _attend(
        self,
        x: jax.Array,
        context: tuple[Any, ...] | None,
        perturb: Mapping[str, jax.Array],
        sides: tuple[int, int] | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        h = x if self.group_norm is None else self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        k, v, *more = self.keys_values(h) if context is None else context
        heads = lambda a: split_heads(a, self.heads)
        q = self.to_q(h)
        q = heads(q * jnp.asarray((q.shape[-1] // self.heads) ** -0.5, q.dtype))
        if "blur" in perturb:
            q = blurred(q, perturb["blur"], sides)
        seen, bias = (k, v), None
        if "reference" in perturb:
            *seen, bias = beside_first(k, v, perturb["reference"])
        attend = functools.partial(attention, q, scale=1.0, split=self.split)
        h = attend(*map(heads, seen), mask=mask, bias=bias)
        if "identity" in perturb:
            h = jnp.where(rows(perturb["identity"], h) > 0, heads(v), h)
        for k, v, weight in more:
            h += weight[..., None, None] * attend(heads(k), heads(v))
        h = self.to_out[0](h.reshape(*h.shape[:2], -1))
        return h if self.group_norm is None else x + h.reshape(x.shape)


class AddedAttention(Attention):
    """Attention of a feature map to itself and to a context at once, with keys and values of the context's own.

    Args:
      width, heads, head_dim, groups: as of `Attention`.
      context: channels of the context.
      only: leave out the attention to itself.
    """

    def __init__(self, width: int, heads: int, head_dim: int, context: int, groups: int, only: bool):
        super().__init__(width, heads, head_dim, bias=True, groups=groups, eps=1e-5)
        inner = heads * head_dim
        self.add_k_proj, self.add_v_proj = Linear(context, inner), Linear(context, inner)
        if only:
            self.to_k = self.to_v = None

    def keys_values(self, context: jax.Array) -> KeysValues:
        """What queries meet of a context [B, M, D]."""
        return self.add_k_proj(context), self.add_v_proj(context)

    def __call__(self, x: jax.Array, context: tuple[jax.Array, ...]) -> jax.Array:
        """[B, H, W, C], with `keys_values`, and behind them where there is one a mask of the context [B, M]."""
        h = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        k, v, *masks = context
        own = 0 if self.to_k is None else h.shape[1]
        if own:
            k, v = jnp.concatenate([k, self.to_k(h)], 1), jnp.concatenate([v, self.to_v(h)], 1)
        mask = jnp.pad(masks[0], ((0, 0), (0, own)), constant_values=True)[:, None, None] if masks else None
        heads = lambda a: split_heads(a, self.heads)
        h = attention(heads(self.to_q(h)), heads(k), heads(v), mask=mask, split=self.split)
        return x + self.to_out[0](h.reshape(*h.shape[:2], -1)).reshape(x.shape)
