"""FreeU: stress what a U-Net knows from below against what its skips hand over, without training.

Reference: Si et al., FreeU: Free Lunch in Diffusion U-Net, 2023.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.nn.perturb import rows


def reweighed(x: jax.Array, skip: jax.Array, backbone: jax.Array, skips: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Half of the channels of x [B, H, W, C] times `backbone` [B], and what is coarse in the skip times `skips` [B].

    Coarse are the Fourier coefficients of frequencies -1 and 0 along both axes.
    """
    half = x.shape[-1] // 2
    factor = jnp.where(np.arange(x.shape[-1]) < half, rows(backbone, x), 1)
    return (x * factor).astype(x.dtype), (skip + (rows(skips, skip) - 1) * _coarse(skip)).astype(skip.dtype)


def _coarse(x: jax.Array) -> jax.Array:
    """The real part of the four lowest frequencies' share of x [B, H, W, C], in float32."""
    b, h, w, c = x.shape
    place = np.stack(np.meshgrid(np.arange(h) / h, np.arange(w) / w, indexing="ij"), -1).reshape(h * w, 2)
    angle = 2 * np.pi * place @ np.array([[0, 0, 1, 1], [0, 1, 0, 1]])  # [H W, 4]; the sign of both does not matter
    waves = np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32) / np.sqrt(h * w)
    flat = x.astype(jnp.float32).reshape(b, h * w, c)
    return jnp.einsum("nk,mk,bmc->bnc", waves, waves, flat, optimize=[(1, 2), (0, 1)]).reshape(x.shape)
