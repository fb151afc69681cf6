"""Panoramas: pictures larger than what a network was made for, of which it sees one window after another.

Where windows overlap, the mean of what the network says counts. As long as a solver's step does not clip, it is linear
in that, and this is the same as the mean of the windows' own steps.

Reference: Bar-Tal et al., MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation, 2023.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import tasks
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline

AROUND = 8  # latents from the other end that the decoder sees at both ends of a picture that closes


def wide(
    pipe: DiffusionPipeline, height: int | None = None, width: int | None = None, latents: jax.Array | None = None
) -> tasks.Prepared:
    """Start from noise.

    Args:
      height, width: in pixels; by default one window high and four wide.
      latents: as of `tasks.text_to_image`.
    """
    window = tasks.native_size(pipe)
    return tasks.text_to_image(pipe, height or window.height, width or 4 * window.width, latents)


def views(pipe: DiffusionPipeline, size: Size, guided: bool, circular_padding: bool = False) -> dict[str, Any]:
    """Where the windows begin, an eighth of a window apart.

    Args:
      circular_padding: whether the picture closes: its right end meets its left.

    Raises:
      ValueError: a size that windows so far apart do not fill.
    """
    factor, window = tasks.vae_factor(pipe), tasks.native_size(pipe)
    starts = []
    for name, side, most, closes in (
        ("height", size.height, window.height, False),
        ("width", size.width, window.width, circular_padding),
    ):
        stride = max(most // factor // 8, 1)
        if side > most and (side - most) % (stride * factor):
            raise ValueError(f"{name}={side}: give at most {most}, or that and a multiple of {stride * factor}.")
        end = side // factor if closes and side > most else max(side - most, 0) // factor + 1
        starts.append(range(0, end, stride))
    corners = np.array([(row, column) for row in starts[0] for column in starts[1]], np.int32)
    return {"views": corners[None]} | ({"decoder_around": np.zeros((1, AROUND))} if circular_padding else {})


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """As of the family, and the windows."""
    return {branch: {**cond, "views": inputs["views"]} for branch, cond in sd.encode(networks, inputs).items()}


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The mean of what the U-Net says of each window, one at a time."""
    cond, corners = {k: v for k, v in cond.items() if k != "views"}, cond["views"][0]
    sides = np.minimum(np.broadcast_to(networks.config("unet").sample_size, 2), x.shape[1:3])
    beyond = [(0, 0), *((0, whole - side) for side, whole in zip(sides, x.shape[1:3])), (0, 0)]

    def add(so_far: tuple[jax.Array, jax.Array], corner: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        window = jnp.roll(x, (-corner[0], -corner[1]), (1, 2))[:, : sides[0], : sides[1]]
        output = sd.predict(networks, window, t, cond).astype(jnp.float32)
        back = lambda a: jnp.roll(jnp.pad(a, beyond), (corner[0], corner[1]), (1, 2))
        return jax.tree.map(jnp.add, so_far, (back(output), back(jnp.ones((1, *sides, 1))))), None

    nothing = jnp.zeros(x.shape, jnp.float32), jnp.zeros((1, *x.shape[1:3], 1))
    (total, count), _ = jax.lax.scan(add, nothing, corners)
    return total / count


def decode(networks: Networks, latents: jax.Array, around: jax.Array | None = None) -> jax.Array:
    """As of the family; of a picture that closes, with a part of the other end at both ends."""
    if around is None:
        return sd.decode(networks, latents)
    n = min(around.shape[-1], latents.shape[2])
    images = sd.decode(networks, jnp.concatenate([latents[:, :, -n:], latents, latents[:, :, :n]], 2))
    extra = n * (images.shape[2] // (latents.shape[2] + 2 * n))
    return images[:, :, extra:-extra]


class StableDiffusionPanoramaPipeline(DiffusionPipeline):
    """Wide pictures with Stable Diffusion 1 or 2; with `circular_padding` they close."""

    family = sd.STABLE_DIFFUSION._replace(encode=encode, predict=predict, decode=decode, encode_image=None)
    task = staticmethod(wide)
    extras = (views,)
