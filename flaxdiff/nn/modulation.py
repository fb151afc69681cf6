"""How a condition shifts, scales and gates what a transformer block does, and the embedding of that condition.

A normalisation without weights of its own is followed by a shift and a scale that a linear layer reads off the
condition: of a time, a text's pooled state, a class. As it does not depend on the sample, what the layers make of it
may be worked out for all steps at once: `modulation` gives it, and calling the layer applies it.

Reference: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.layers import LayerNorm, Linear, value

WAVES = 256  # sinusoids of a time


def vary(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x of which the scale is a change: x (1 + scale) + shift."""
    # Else every product that reads it works it out again on a TPU, which is slower than once and longer to compile.
    return jax.lax.optimization_barrier(x * (1 + scale) + shift)


class AdaLayerNorm(nnx.Module):
    """Normalise, scale and shift by the condition; what else the condition says is handed on.

    Args:
      width: channels of a token.
      parts: vectors that the condition gives. 2 are scale and shift (diffusers' AdaLayerNormContinuous); 3 are shift,
        scale and gate of one layer (AdaLayerNormZeroSingle); 6 those of the attention and then of the feed-forward
        (AdaLayerNormZero); 9 those of a second attention too (SD35AdaLayerNormZeroX).
      condition: channels of the condition, by default the tokens'.
      norm: the normalisation, by default one without weights.
      bias: whether the layer that reads the condition has one.
    """

    def __init__(
        self,
        width: int,
        parts: int,
        *,
        condition: int | None = None,
        norm: nnx.Module | None = None,
        bias: bool = True,
    ):
        self.linear = Linear(condition or width, parts * width, bias)
        self.norm = LayerNorm(width, 1e-6, affine=False) if norm is None else norm
        self.parts = parts

    def modulation(self, condition: jax.Array) -> jax.Array:
        """What the condition [..., D] has to say: [..., parts, width]."""
        y = self.linear(jax.nn.silu(condition))
        return y.reshape(*y.shape[:-1], self.parts, -1)

    def __call__(self, x: jax.Array, modulation: jax.Array) -> list[jax.Array]:
        """[B, N, C] and its `modulation` [B, parts, C] -> the tokens, and the parts behind the first two [B, 1, C]."""
        first, second, *rest = jnp.split(modulation, self.parts, -2)
        shift, scale = (first, second) if rest else (second, first)
        return [vary(self.norm(x), shift, scale), *rest]


class CombinedTimestepTextProjEmbeddings(nnx.Module):
    """What a time, a text's pooled state and, with `guided`, a strength of guidance add up to."""

    def __init__(self, width: int, pooled: int, guided: bool = False):
        self.timestep_embedder = TimestepEmbedding(WAVES, width)
        self.guidance_embedder = TimestepEmbedding(WAVES, width) if guided else None
        self.text_embedder = TimestepEmbedding(pooled, width)

    def __call__(self, t: jax.Array, pooled: jax.Array, guidance: jax.Array | None = None) -> jax.Array:
        """Times [B], or [N, 1] for N steps at once, pooled [B, P] and strengths [B] -> [..., B, D]."""
        dtype = weights.dtype(value(self.text_embedder.linear_1.weight))
        y = self.timestep_embedder(sinusoids(t, WAVES).astype(dtype)) + self.text_embedder(pooled.astype(dtype))
        return y if guidance is None else y + self.guidance_embedder(sinusoids(guidance, WAVES).astype(dtype))
