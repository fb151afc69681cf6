"""Square patches of a feature map as tokens, and back: how a transformer reads a latent and writes its prediction.

A token knows its place by sinusoids of its column and its row. They are worked out for a grid of any size, or cut out
of the middle of a table in the checkpoint.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import param
from flaxdiff.nn.layers import Conv, value


def positions(height: int, width: int, base: int, channels: int, scale: float = 1.0) -> np.ndarray:
    """Sinusoids of column and of row, half of the channels each, for a grid of patches: [height * width, channels].

    Places are measured as in the grid of `base` by `base` that the network was trained on, divided by a scale.

    >>> positions(2, 3, 4, 8).shape
    (6, 8)
    """
    omega = 10_000.0 ** -(np.arange(channels // 4) / (channels // 4))
    rows, columns = (np.arange(n, dtype=np.float32) / (n / base) / scale for n in (height, width))
    angles = [np.float64(places)[..., None] * omega for places in np.meshgrid(columns, rows)]
    waves = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], -1)
    return waves.reshape(height * width, channels).astype(np.float32)


class _Sinusoids(NamedTuple):
    """The initial values of a table of so many places a side."""

    side: int
    base: int

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(positions(self.side, self.side, self.base, shape[-1])).reshape(shape)


class PatchEmbed(nnx.Module):
    """Square patches as tokens that know their place.

    Args:
      fan_in, width: channels of the feature map and of the tokens.
      patch: side of a patch.
      base, scale: as of `positions`; without a base tokens do not know their place.
      largest: places a side of a table in the checkpoint, whose middle is used in place of those.
    """

    def __init__(
        self, fan_in: int, width: int, patch: int, base: int | None, *, scale: float = 1.0, largest: int | None = None
    ):
        self.proj = Conv(fan_in, width, patch, stride=patch, padding=0)
        table = None if largest is None else param((1, largest**2, width), "raw", _Sinusoids(largest, base))
        self.pos_embed, self.largest = table, largest
        self.patch, self.base, self.scale = patch, base, scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, N, D].

        Raises:
          ValueError: height or width is no multiple of the patches' side, or more than there are places.
        """
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"Latents of {height} x {width} do not divide into patches of {self.patch} x {self.patch}."
            )
        x = self.proj(x.astype(weights.dtype(value(self.proj.weight))))
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return tokens if self.base is None else tokens + self.places(*x.shape[1:]).astype(x.dtype)

    def places(self, h: int, w: int, width: int) -> jax.Array | np.ndarray:
        """What tells of the places in a grid of h by w: [h w, D]."""
        if self.largest is None:
            return positions(h, w, self.base, width, self.scale)
        if max(h, w) > self.largest:
            raise ValueError(
                f"{h} x {w} patches are more than the {self.largest} x {self.largest} places that the network has been "
                "trained with; make a smaller picture."
            )
        top, left = (self.largest - h) // 2, (self.largest - w) // 2
        grid = value(self.pos_embed).reshape(self.largest, self.largest, width)
        return grid[top : top + h, left : left + w].reshape(h * w, width)


def unpatched(x: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """Tokens [B, N, P P C] as a feature map [B, H, W, C].

    >>> unpatched(jnp.zeros((1, 6, 8)), 4, 6, 2).shape
    (1, 4, 6, 2)
    """
    x = x.reshape(len(x), height // patch, width // patch, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(len(x), height, width, -1)
