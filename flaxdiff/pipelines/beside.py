"""What a network is told beside the sample and the text: further channels, a class, the guidance it was distilled with.

The keys of the inputs that say so, each absent where task and network have no use for it:
  beside                        [B, h, w, C] channels to join to the sample: a mask, a small picture; what is smaller
                                than the sample is repeated
  beside_alpha, beside_sigma    [] factors of those channels and of the noise to add to them
  beside_image                  [B, H, W, 3] in [-1, 1]: a picture whose latent follows those channels
  depth                         [B, h, w, 1] how near things are, in any unit; or
  depth_pixels                  [B, S, S, 3] in [-1, 1]: a picture for the depth model to say so
  beside_gain, beside_spread    [] factors of that latent, and of the posterior's deviation in it: 1 a draw, 0 the mean
  class_labels                  [B] int32
  timestep_cond                 [B, D] the strength of guidance, as a network reads it that was distilled with it
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import images as pictures

if TYPE_CHECKING:
    from flaxdiff.pipelines.generate import Cond, Family, Networks

LATENT, NOISE = 2, 3  # folded into an image's key; 1 is the draw of the latent that the run starts from


def tell(
    family: "Family", networks: "Networks", keys: jax.Array, inputs: Mapping[str, Any], branches: Mapping[str, "Cond"]
) -> Mapping[str, "Cond"]:
    """The branches, told of all this as well.

    Where a picture guides beside the text there are three of them: text and picture, picture alone, neither.
    """
    told = {k: jnp.asarray(inputs[k]) for k in ("class_labels", "timestep_cond") if k in inputs}
    if parts := _channels(family, networks, keys, inputs):
        told["beside"] = jnp.concatenate(parts, -1)
    branches = {branch: {**cond, **told} for branch, cond in branches.items()}
    if "image_guidance_scale" in (inputs.get("guidance") or {}):
        branches["image"] = branches["negative"]
        branches["negative"] = {**branches["negative"], "beside": jnp.zeros_like(told["beside"])}
    return branches


def _channels(family: "Family", networks: "Networks", keys: jax.Array, inputs: Mapping[str, Any]) -> list[jax.Array]:
    """The further channels, in their order."""
    folded = lambda n: jax.vmap(jax.random.fold_in, (0, None))(keys, n)
    parts = []
    if "beside" in inputs:
        x = jnp.asarray(inputs["beside"], jnp.float32)
        if "beside_sigma" in inputs:
            noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(folded(NOISE))
            x = inputs["beside_alpha"] * x + inputs["beside_sigma"] * noise
        parts.append(x)
    if "depth" in inputs or "depth_pixels" in inputs:
        parts.append(_depth(family, networks, inputs))
    if "beside_image" in inputs:
        z = family.encode_image(networks, inputs["beside_image"], folded(LATENT), inputs["beside_spread"])
        parts.append(inputs["beside_gain"] * z.astype(jnp.float32))
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
