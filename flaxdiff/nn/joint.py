"""Text and image tokens that attend to each other at eye level, each with weights of its own.

Stable Diffusion 3, Flux and those after them have no attention to a text: its tokens and those of the picture make one
sequence, text first, that attends to itself. `JointTransformerBlock` is the block that they share; behind it
ControlNets may add to the picture's tokens.

Reference: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff.nn.attention import attention, split_heads
from flaxdiff.nn.feed_forward import FeedForward
from flaxdiff.nn.layers import LayerNorm, Linear, RMSNorm, value
from flaxdiff.nn.modulation import AdaLayerNorm, vary
from flaxdiff.nn.reusing import reused
from flaxdiff.nn.rope import Rope, normalised, rms, rotate
from flaxdiff.nn.stack import Blocks, depth
from flaxdiff.parallel import constrain

Tokens = tuple[jax.Array, jax.Array]  # of the text [B, M, D] and of the picture [B, N, D]


class Residuals(NamedTuple):
    """What is added to the picture's tokens behind the blocks: [K, B, N, D], and which of the K behind each block."""

    added: jax.Array
    which: np.ndarray

    @classmethod
    def spread(cls, added: jax.Array | None, blocks: Blocks, cycle: bool = False) -> "Residuals | None":
        """Fewer of them than blocks: each serves several in a row, or with `cycle` they begin anew."""
        if added is None:
            return None
        n, k = depth(blocks), len(added)
        return cls(jnp.asarray(added), np.arange(n) % k if cycle else np.arange(n) // -(-n // k))

    def behind(self, i: jax.Array, texts: int = 0) -> jax.Array:
        """What is added behind block i, to so many tokens of a text nothing."""
        return jnp.pad(self.added[i], ((0, 0), (texts, 0), (0, 0)))


class Seen(NamedTuple):
    """What the picture's tokens see beside the text and themselves: the tokens of a picture that is a prompt.

    Attributes:
      k, v: its keys, normalised, and values [B, T, H, D].
      norm_q, norm_k: the weights [D] by which the picture's own queries and keys are normalised there.
      weight: how much it counts [B].
    """

    k: jax.Array
    v: jax.Array
    norm_q: jax.Array
    norm_k: jax.Array
    weight: jax.Array


class JointAttention(nnx.Module):
    """Multi-head attention of one sequence to itself, of a picture's tokens and perhaps of a text's before them.

    Args:
      width: channels of the tokens.
      heads, head_dim: their number and size.
      qk_norm: normalise queries and keys by their root mean square.
      text: whether there are tokens of a text; `text_out`: whether they are wanted afterwards.
      out: whether a linear layer follows.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        qk_norm: bool = True,
        text: bool = True,
        text_out: bool = True,
        out: bool = True,
    ):
        inner = heads * head_dim
        norm = lambda there: RMSNorm(head_dim) if there and qk_norm else None
        project = lambda there: Linear(width, inner) if there else None
        self.to_q, self.to_k, self.to_v = (project(True) for _ in range(3))
        self.norm_q, self.norm_k = norm(True), norm(True)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (project(text) for _ in range(3))
        self.norm_added_q, self.norm_added_k = norm(text), norm(text)
        self.to_out = nnx.List([Linear(inner, width)]) if out else None
        self.to_add_out = Linear(inner, width) if text and text_out else None
        self.heads, self.scale = heads, head_dim**-0.5

    def _heads(
        self, x: jax.Array, project: Linear, norm: RMSNorm | None = None, turn: Rope | None = None, scale: float = 1.0
    ) -> jax.Array:
        h = project(x)
        if norm is None:
            return rotate(split_heads(h * jnp.asarray(scale, h.dtype), self.heads), turn)
        return normalised(split_heads(h, self.heads), scale * value(norm.weight).astype(jnp.float32), turn, norm.eps)

    def _queries_keys_values(self, x: jax.Array, layers: tuple, turn: Rope | None) -> tuple[jax.Array, ...]:
        """Queries are scaled already, by the weights of their normalisation if there is one."""
        to_q, to_k, to_v, norm_q, norm_k = layers
        q = self._heads(x, to_q, norm_q, turn, self.scale)
        return q, self._heads(x, to_k, norm_k, turn), self._heads(x, to_v)

    def __call__(
        self,
        image: jax.Array,
        text: jax.Array | None = None,
        turn: Rope | None = None,
        mask: jax.Array | None = None,
        seen: tuple[Seen, ...] = (),
    ) -> Tokens:
        """[B, N, C], and the text's tokens [B, M, C] -> (text, image).

        `turn` is by place, and `mask` says as of `attention` who sees whom: of the text's tokens first. `seen` is what
        the picture sees besides.
        """
        return reused("spatial", lambda: self._attend(image, text, turn, mask, seen))

    def _attend(
        self,
        image: jax.Array,
        text: jax.Array | None,
        turn: Rope | None,
        mask: jax.Array | None,
        seen: tuple[Seen, ...],
    ) -> tuple[jax.Array | None, jax.Array]:
        m = 0 if text is None else text.shape[1]
        of_text, of_image = (turn and tuple(a[part] for a in turn) for part in (slice(m), slice(m, None)))
        own = self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k
        q, k, v = self._queries_keys_values(image, own, of_image)
        if text is not None:
            added = self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k
            more = self._queries_keys_values(text, added, of_text)
            # heads stay side by side in a token, but where they were turned: see nn/flash.py
            flat = lambda a: a.reshape(*a.shape[:2], -1)
            heads = lambda *parts: jnp.concatenate(list(map(flat, parts)), 1).reshape(len(image), -1, *v.shape[2:])
            join = lambda *parts: heads(*parts) if turn is None else jnp.concatenate(parts, 1)
            q, k, v = join(more[0], q), join(more[1], k), heads(more[2], v)
        h = attention(q, k, v, mask=mask, scale=1.0)
        h = h.reshape(*h.shape[:2], -1)
        found = [self._beside(image, one) for one in seen]
        text, image = (None, h) if text is None else jnp.split(h, [m], 1)
        image = sum(found, image)
        image = image if self.to_out is None else self.to_out[0](image)
        return text if self.to_add_out is None else self.to_add_out(text), image

    def _beside(self, image: jax.Array, seen: Seen) -> jax.Array:
        """What the picture's tokens [B, N, C] find among themselves and those of another, weighted, [B, N, C]."""
        q, k, v = (self._heads(image, layer) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = rms(q, seen.norm_q), rms(k, seen.norm_k)
        h = attention(q, jnp.concatenate([k, seen.k], 1), jnp.concatenate([v, seen.v], 1))
        return seen.weight[:, None, None].astype(h.dtype) * h.reshape(*h.shape[:2], -1)

    def look(self, image: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """What the picture's tokens [B, N, C] find, wherever they are, among keys and values [B, T, C] of others."""
        k, v = (split_heads(a, self.heads) for a in (k, v))
        return attention(self._heads(image, self.to_q, self.norm_q), k, v).reshape(image.shape)


class JointTransformerBlock(nnx.Module):
    """Attention of text and picture to each other, then a feed-forward for each, shifted, scaled and gated.

    Args:
      width, heads, head_dim: as of `JointAttention`.
      qk_norm: as of it.
      text_out: whether the tokens of the text are wanted afterwards; the last block of Stable Diffusion 3 drops them.
      dual: whether the picture attends to itself alone as well.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, qk_norm: bool = True, text_out: bool = True, dual: bool = False
    ):
        self.norm1 = AdaLayerNorm(width, 9 if dual else 6)
        self.norm1_context = AdaLayerNorm(width, 6 if text_out else 2)
        self.attn = JointAttention(width, heads, head_dim, qk_norm=qk_norm, text_out=text_out)
        self.attn2 = JointAttention(width, heads, head_dim, qk_norm=qk_norm, text=False) if dual else None
        self.norm2, self.ff = LayerNorm(width, 1e-6, affine=False), FeedForward(width, "gelu-approximate")
        self.norm2_context = LayerNorm(width, 1e-6, affine=False) if text_out else None
        self.ff_context = FeedForward(width, "gelu-approximate") if text_out else None

    def modulation(self, condition: jax.Array) -> Tokens:
        """What a condition [..., D] says to the text and to the picture: [..., parts, D] each."""
        return self.norm1_context.modulation(condition), self.norm1.modulation(condition)

    def modulated(self, x: Tokens, each: tuple[Any, ...], *args: Any) -> jax.Array:
        """What the attention reads of the picture, given what a block is called with that is told so first of all."""
        return self.norm1(x[1], each[0][1])[0]

    def __call__(
        self,
        x: Tokens,
        told: Tokens,
        turn: Rope | None = None,
        mask: jax.Array | None = None,
        seen: tuple[Seen, ...] = (),
    ) -> Tokens:
        """Tokens of text and picture and what `modulation` says to them -> tokens; the text as it was if not wanted."""
        text, image = x
        h, gate, shift, scale, gate_ff, *second = self.norm1(image, told[1])
        h_text, *rest = self.norm1_context(text, told[0])
        of_text, of_image = self.attn(h, h_text, turn, mask, seen)
        added = gate * of_image
        if self.attn2 is not None:
            *how, gate = second
            added += gate * self.attn2(vary(self.norm1.norm(image), *how))[1]
        image = image + added
        image = constrain(image + gate_ff * self.ff(vary(self.norm2(image), shift, scale)), "batch", "context")
        if not rest:
            return text, image
        gate, shift, scale, gate_ff = rest
        text = text + gate * of_text
        text = text + gate_ff * self.ff_context(vary(self.norm2_context(text), shift, scale))
        return constrain(text, "batch", "context"), image
