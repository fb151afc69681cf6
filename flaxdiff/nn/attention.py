"""Scaled dot-product attention, and the multi-head layer of the Stable Diffusion families.

`attention` is the one place that decides how softmax(QKᵀ/√d)V is computed. "plain" materialises the scores; "sliced"
walks over heads and blocks of query rows, so that the scores never take more than one block of memory; "auto" is
plain while the scores are small and sliced beyond. The choice is `spec.config.attention`, set for every layer at once
by `apply`.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import attention_backend
from flaxdiff.nn.layers import GroupNorm, Linear

ROWS = 512  # query rows in a slice: the block of scores stays in cache
LARGE = 2**22  # scores (batch x heads x queries x keys) beyond which "auto" slices
BACKENDS = ("auto", "plain", "sliced")

# Files older than diffusers 0.12 name the attention between convolutions after its parts.
RENAMES = tuple(
    (rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
)

_seen: contextvars.ContextVar[list[tuple[jax.Array, jax.Array]] | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def seen() -> Iterator[list[tuple[jax.Array, jax.Array]]]:
    """Within this context, the scaled queries [B, N, H, D] and the keys [B, M, H, D] of each attention, in order.

    They are values of the trace at hand, so a loss may read them; the model must not be scanned over its layers.

    >>> with seen() as pairs:
    ...     _ = attention(*[jnp.ones((1, 5, 2, 4))] * 3)
    >>> [k.shape for q, k in pairs]
    [(1, 5, 2, 4)]
    """
    token = _seen.set([])
    try:
        yield _seen.get()
    finally:
        _seen.reset(token)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """softmax(QKᵀ/√d)V, softmax in float32.

    Args:
      q: queries [B, N, H, D].
      k, v: keys and values [B, M, H, D].
      causal: whether position n sees only positions up to n.

    Raises:
      ValueError: an unknown backend.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> attention(x, x, x).shape
    (1, 5, 2, 4)

    Reference: Vaswani et al., Attention Is All You Need, 2017; in slices: Rabe and Staats, Self-attention Does Not Need
    O(n²) Memory, 2021.
    """
    backend = attention_backend.get()
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r} is not known; use one of {BACKENDS}.")
    (b, n, h, d), m = q.shape, k.shape[1]
    if backend == "auto":
        backend = "sliced" if b * h * n * m > LARGE and not causal else "plain"
    q = q * jnp.asarray(d**-0.5, q.dtype)
    if (pairs := _seen.get()) is not None:
        pairs.append((q, k))
    if backend == "plain" or causal:
        return _plain(q, k, v, causal)

    rows = next(r for r in range(min(ROWS, n), 0, -1) if n % r == 0)
    one_head = lambda q, k, v: _plain(q[None, :, None], k[None, :, None], v[None, :, None], False)[0, :, 0]

    def head(qkv):  # one head of one picture: [N, D], [M, D], [M, D]
        q, k, v = qkv
        return jax.lax.map(lambda q: one_head(q, k, v), q.reshape(n // rows, rows, d)).reshape(n, d)

    heads = tuple(a.swapaxes(1, 2).reshape(b * h, -1, d) for a in (q, k, v))
    return jax.lax.map(head, heads).reshape(b, h, n, d).swapaxes(1, 2)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    if causal:
        n, m = scores.shape[-2:]
        scores = jnp.where(jnp.tri(n, m, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores).astype(v.dtype), v)


class Attention(nnx.Module):
    """Multi-head attention of tokens to themselves or to a context, with diffusers' names.

    Args:
      width: channels of the tokens.
      heads, head_dim: their number and size.
      context: channels of the context; None for self-attention.
      bias: whether queries, keys and values have one.
      groups, eps: normalise the tokens in groups first, and add the result to the input (autoencoders, UNet2DModel).
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
    ):
        inner = heads * head_dim
        self.group_norm = None if groups is None else GroupNorm(width, groups, eps)
        self.to_q = Linear(width, inner, bias)
        self.to_k = Linear(context or width, inner, bias)
        self.to_v = Linear(context or width, inner, bias)
        self.to_out = nnx.List([Linear(inner, width)])
        self.heads = heads

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """[B, N, C], or [B, H, W, C] when normalised in groups, and [B, M, D] -> the shape of x."""
        h = x if self.group_norm is None else self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        c = h if context is None else context
        split = lambda a: a.reshape(*a.shape[:2], self.heads, -1)
        h = attention(split(self.to_q(h)), split(self.to_k(c)), split(self.to_v(c)))
        h = self.to_out[0](h.reshape(*h.shape[:2], -1))
        return h if self.group_norm is None else x + h.reshape(x.shape)
