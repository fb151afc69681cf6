"""What a network is told beside the sample and the text: further channels, a class, the guidance it was distilled with.

The keys of the inputs that say so, each absent where task and network have no use for it:
  beside                        [B, h, w, C] channels to join to the sample: a mask, a small picture; what is smaller
                                than the sample is repeated
  beside_alpha, beside_sigma    [] factors of those channels and of the noise to add to them
  beside_image                  [B, H, W, 3] in [-1, 1]: a picture whose latent follows those channels
  depth                         [B, h, w, 1] how near things are, in any unit; or
  depth_pixels                  [B, S, S, 3] in [-1, 1]: a picture for the depth model to say so
  beside_gain, beside_spread    factors of that latent, [] or [B, h, w, 1], and [] of the posterior's deviation in it:
                                1 a draw, 0 the mean
  behind                        [B, h, w, C] channels that follow all of these
  class_labels, class_count     [B] int32, and [] where `ANY` may be among them: one of so many, drawn
  timestep_cond                 [B, D] the strength of guidance, as a network reads it that was distilled with it
  freeu                         [B, 4] the factors s1, s2, b1, b2 of nn/freeu.py
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import images as pictures
from flaxdiff.schedulers.tables import folded

if TYPE_CHECKING:
    from flaxdiff.pipelines.generate import Cond, Family, Networks, Size
    from flaxdiff.pipelines.pipeline import DiffusionPipeline

# folded into an image's key; 1 is the draw of the latent that the run starts from
LATENT, NOISE, CLASS, EMBEDS, KNOWN, CONTROL = 2, 3, 4, 5, 6, 8
ANY = -1  # in the place of a class


def prepare(pipe: "DiffusionPipeline", size: "Size", guided: bool, freeu: Sequence[float] | None = None) -> dict:
    """FreeU's factors, where a U-Net is to work so.

    Args:
      freeu: s1, s2 for what the skips hand over, b1, b2 for what comes from below, in the lowest two up stages;
        [4], or one row for each prompt. By default as `enable_freeu` has it.

    Raises:
      ValueError: not four numbers, or a network that has no such stages.
    """
    if freeu is None:
        return {}
    factors = np.atleast_2d(np.asarray(freeu, np.float32))
    if factors.ndim != 2 or factors.shape[1] != 4:
        raise ValueError(f"freeu={freeu!r}: give four numbers, s1, s2, b1 and b2.")
    if "freeu" not in inspect.signature(pipe.denoiser.module.__call__).parameters:
        raise ValueError(f"{pipe.denoiser.module.__name__} knows no freeu; leave it out.")
    return {"freeu": factors}


def tell(
    family: "Family", networks: "Networks", keys: jax.Array, inputs: Mapping[str, Any], branches: Mapping[str, "Cond"]
) -> Mapping[str, "Cond"]:
    """The branches, told of all this as well, as far as the family's `encode` does not tell a branch otherwise.

    Where a picture guides beside the text there are three of them: text and picture, picture alone, neither.
    """
    told = {k: jnp.asarray(inputs[k]) for k in ("class_labels", "timestep_cond", "freeu") if k in inputs}
    if "class_count" in inputs:
        draw = lambda key: jax.random.randint(jax.random.fold_in(key, CLASS), (), 0, inputs["class_count"])
        told["class_labels"] = jnp.where(told["class_labels"] == ANY, jax.vmap(draw)(keys), told["class_labels"])
    if parts := _channels(family, networks, keys, inputs):
        told["beside"] = jnp.concatenate(parts, -1)
    branches = {branch: {**told, **cond} for branch, cond in branches.items()}
    if "image_guidance_scale" in inputs["guidance"] and "beside" not in told:
        raise ValueError("image_guidance_scale is for pipelines that see a picture beside the sample; leave it out.")
    if "image_guidance_scale" in inputs["guidance"] and "negative" in branches:
        branches["image"] = branches["negative"]
        branches["negative"] = {**branches["negative"], "beside": jnp.zeros_like(told["beside"])}
    return branches


def _channels(family: "Family", networks: "Networks", keys: jax.Array, inputs: Mapping[str, Any]) -> list[jax.Array]:
    """The further channels, in their order."""
    parts = []
    if "beside" in inputs:
        x = jnp.asarray(inputs["beside"], jnp.float32)
        if "beside_sigma" in inputs:
            noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(folded(keys, NOISE))
            x = inputs["beside_alpha"] * x + inputs["beside_sigma"] * noise
        parts.append(x)
    if "depth" in inputs or "depth_pixels" in inputs:
        parts.append(_depth(family, networks, inputs))
    if "beside_image" in inputs:
        z = family.encode_image(networks, inputs["beside_image"], folded(keys, LATENT), inputs["beside_spread"])
        parts.append(inputs["beside_gain"] * z.astype(jnp.float32))
    if "behind" in inputs:
        parts.append(jnp.asarray(inputs["behind"], jnp.float32))
    height = family.latent_shape(networks.specs, inputs["size"])[0]
    larger = lambda x: jnp.repeat(jnp.repeat(x, height // x.shape[1], 1), height // x.shape[1], 2)
    return [x if x.shape[1] == height else larger(x) for x in parts]


def _depth(family: "Family", networks: "Networks", inputs: Mapping[str, Any]) -> jax.Array:
    """The depth of each picture, from -1, the furthest, to 1, the nearest: [B, h, w, 1]."""
    if "depth" in inputs:
        depth = jnp.asarray(inputs["depth"], jnp.float32)
    else:
        depth = networks("depth_estimator", inputs["depth_pixels"])[..., None]
        sides = zip(depth.shape[1:3], family.latent_shape(networks.specs, inputs["size"]))
        down, across = (pictures.cubic(*old_and_new).astype(np.float32) for old_and_new in sides)
        depth = jnp.einsum("ih,bhwc,jw->bijc", down, depth, across)
    low, high = depth.min((1, 2), keepdims=True), depth.max((1, 2), keepdims=True)
    return 2 * (depth - low) / jnp.where(high > low, high - low, 1) - 1
