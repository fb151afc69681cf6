"""Squares of a latent as tokens: those of a channel lie side by side in a token, row by row.

It is how Flux and its kin lay out what their networks read; the loop moves latents.
"""

import jax
import numpy as np


def pack(x: jax.Array, side: int = 2) -> jax.Array:
    """Latents [B, H, W, C] -> tokens [B, N, side² C] of so many latents along each side, row by row.

    >>> pack(np.zeros((1, 4, 6, 16))).shape
    (1, 6, 64)
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h * w // side**2, c * side**2)


def unpack(x: jax.Array, height: int, width: int, side: int = 2) -> jax.Array:
    """Tokens [B, N, side² C] -> latents [B, height, width, C].

    >>> x = np.arange(64.0).reshape(1, 4, 8, 2)
    >>> bool((unpack(pack(x), 4, 8) == x).all())
    True
    """
    x = x.reshape(len(x), height // side, width // side, -1, side, side).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(len(x), height, width, -1)


def places(height: int, width: int, first: int = 0) -> np.ndarray:
    """(first, row, column) of each token of a grid, [height · width, 3]; `first` tells several grids apart.

    >>> places(2, 2)[:, 1:].tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    grid = np.indices((height, width), np.float32).reshape(2, -1).T
    return np.concatenate([np.full((len(grid), 1), first, np.float32), grid], -1)
