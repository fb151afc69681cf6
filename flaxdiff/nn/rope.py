"""Rotary position embedding: queries and keys turned by angles that grow with the place, so that their product depends
on how far apart two tokens are.

Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Rope = tuple[jax.Array, jax.Array]  # cosines and sines [N, D], in float32


def rope(places: jax.Array, widths: Sequence[int], theta: float = 10_000.0) -> Rope:
    """The cosine and sine for each channel of a head, neighbours in pairs.

    Args:
      places: where each token is along each axis, [N, axes].
      widths: how many channels tell of each axis; their sum is D.
      theta: the slowest pair of an axis turns by nearly 1/theta from one place to the next.

    >>> cos, sin = rope(jnp.zeros((5, 2)), (4, 8))
    >>> cos.shape, float(sin.max())
    ((5, 12), 0.0)
    """
    omega = [np.repeat(theta ** (-np.arange(0, w, 2) / w), 2).astype(np.float32) for w in widths]
    parts = [jnp.asarray(places)[:, i, None].astype(jnp.float32) * w for i, w in enumerate(omega)]
    angle = jnp.concatenate(parts, -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, turn: Rope | None) -> jax.Array:
    """Queries or keys [B, N, H, D] turned; unchanged without a turn."""
    if turn is None:
        return x
    cos, sin = (a[:, None] for a in turn)
    # (x₀, x₁) -> (-x₁, x₀): as a product, for a TPU moves nothing along the channels as fast as its matrix unit
    swap = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
    h = x.astype(jnp.float32)
    across = jnp.einsum("bnhd,de->bnhe", x, swap.astype(x.dtype), preferred_element_type=jnp.float32)
    return (h * cos + across * sin).astype(x.dtype)
