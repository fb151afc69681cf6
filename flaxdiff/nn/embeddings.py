"""Embeddings of numbers: sinusoids of a timestep or a size, and the small network that follows them."""

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff.core import param
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.layers import Linear, normal, value


def sinusoids(
    t: jax.Array, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0, max_period: float = 10_000
) -> jax.Array:
    """[sin(t ω), cos(t ω)] with ω_i = max_period^(-i / (width/2 - freq_shift)), in float32.

    Args:
      t: any numbers [...]; integers or floats.
      width: size of the embedding.
      flip_sin_to_cos: cosines first.
      freq_shift: how far the last frequency lies from 1/max_period.

    Returns:
      [..., width]; a zero is appended to an odd width.

    >>> sinusoids(jnp.array([0, 1]), 4).shape
    (2, 4)

    Reference: Vaswani et al., Attention Is All You Need, 2017; Ho et al., Denoising Diffusion Probabilistic Models,
      2020.
    """
    half = width // 2
    omega = jnp.exp(-jnp.log(jnp.float32(max_period)) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angle = t.astype(jnp.float32)[..., None] * omega
    parts = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
    embedding = jnp.concatenate(parts, -1)
    return jnp.pad(embedding, [(0, 0)] * t.ndim + [(0, width % 2)])


class TimestepEmbedding(nnx.Module):
    """Linear, activation, linear; a condition of so many numbers is projected and added before, where there is one.

    `post_act_fn` names an activation of the result, if any; `fan_out` is its width where that is not the hidden one.
    """

    def __init__(
        self,
        fan_in: int,
        width: int,
        act_fn: str = "silu",
        condition: int | None = None,
        post_act_fn: str | None = None,
        fan_out: int | None = None,
        bias: bool = True,
    ):
        self.linear_1, self.linear_2 = Linear(fan_in, width, bias), Linear(width, fan_out or width, bias)
        self.act_fn, self.post_act_fn = act_fn, post_act_fn
        self.cond_proj = None if condition is None else Linear(condition, fan_in, bias=False)

    def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        x = x if condition is None else x + self.cond_proj(condition)
        x = self.linear_2(ACTIVATIONS[self.act_fn](self.linear_1(x)))
        return x if self.post_act_fn is None else ACTIVATIONS[self.post_act_fn](x)


class GaussianFourierProjection(nnx.Module):
    """[sin(2π t W), cos(2π t W)] with frequencies W of the checkpoint's own; `flip_sin_to_cos`: cosines first."""

    def __init__(self, width: int, flip_sin_to_cos: bool):
        self.weight = param((width,), "raw", normal)
        self.flip_sin_to_cos = flip_sin_to_cos

    def __call__(self, t: jax.Array) -> jax.Array:
        angle = 2 * jnp.pi * t.astype(jnp.float32)[..., None] * value(self.weight).astype(jnp.float32)
        parts = (jnp.cos(angle), jnp.sin(angle)) if self.flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
        return jnp.concatenate(parts, -1)
