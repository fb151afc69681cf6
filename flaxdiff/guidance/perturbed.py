"""Rules that compare the network with a worse one: itself, with some of its blocks hindered, or another.

What hinders a block is a value for each image and block, so the layers may change without compiling again: a branch
that asks for it tells the network beside its text {kind: for each stack of blocks, [B, depth]}, see
`nn.perturb.Perturbed`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flaxdiff.guidance.rules import At, Branches, Flags, Guidance, Predictions, per_image
from flaxdiff.nn.perturb import FIRST


def pag(scale: jax.Array | float, layers: Flags, adaptive_scale: jax.Array | float = 0.0) -> Guidance:
    """Perturbed-attention guidance: away from a prediction whose chosen self-attentions see only their own position.

    guess + scale (positive - perturbed), the scale lowered by adaptive_scale (1000 - t), to 0 at the least.

    Args:
      layers: which blocks, as a parameter of the kind `Layers` is handed over.

    Reference: Ahn et al., Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance, 2024.
    """

    def strength(at: At) -> jax.Array:
        lowered = jnp.asarray(scale) - jnp.asarray(adaptive_scale) * (1000 - at.sampler.timestep)
        return jnp.where(jnp.asarray(adaptive_scale) > 0, jnp.maximum(lowered, 0), scale)

    return _away("pag", "identity", layers, strength)


def seg(scale: jax.Array | float, layers: Flags, sigma: jax.Array | float = jnp.inf) -> Guidance:
    """Smoothed energy guidance: away from a prediction whose chosen self-attentions ask with blurred queries.

    guess + scale (positive - perturbed).

    Args:
      layers: as of `pag`.
      sigma: of the Gaussian, in positions; infinite for the mean over all.

    Reference: Hong, Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention,
    2024.
    """
    widths = tuple(jnp.where(flags > 0, jnp.asarray(sigma)[..., None], 0.0) for flags in layers)
    return _away("seg", "blur", widths, lambda at: scale)


def slg(scale: jax.Array | float, layers: Flags) -> Guidance:
    """Skip-layer guidance: away from a prediction without the chosen blocks: guess + scale (positive - perturbed).

    Args:
      layers: as of `pag`.

    Reference: Hyung et al., Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling, 2024.
    """
    return _away("slg", "skip", layers, lambda at: scale)


def reference(scale: jax.Array | float, layers: Flags) -> Guidance:
    """Reference-only: the chosen self-attentions look at the places of the batch's first image as well.

    Of a picture the first image is made by inpainting it where nothing is masked, so that it is under the noise of each
    step. The rule comes last in a chain: all branches are told of it.

    Args:
      scale: how much those places weigh beside an image's own; 0 for none.
      layers: as of `pag`.

    Reference: Zhang, Reference-only Control, ControlNet extension of the Stable Diffusion web UI, 2023.
    """

    def branches(so_far: Branches) -> Branches:
        batch = len(jax.tree.leaves(so_far["positive"])[0])
        weigh = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), batch).at[0].set(FIRST)
        told = {"reference": tuple(weigh[:, None] * of_stack for of_stack in layers)}
        return {name: {**cond, "perturb": {**cond.get("perturb", {}), **told}} for name, cond in so_far.items()}

    return Guidance(lambda state, guess, *_: (guess, state), branches=branches)


def autoguidance(scale: jax.Array | float) -> Guidance:
    """Away from what a weaker network says: guess + (scale - 1) (positive - weaker).

    It is one that was trained less, or is smaller, and lies beside the one in the loop with "_weaker" behind its name:

        pipe = type(pipe).from_pipe(pipe, unet_weaker=spec).replace(guidance=mine)
        pipe(params | {"unet_weaker": others}, key, prompt="…")

    Raises:
      ValueError: the pipeline has none.

    Reference: Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024.
    """

    def combine(state, guess, predictions: Predictions, at: At):
        if at.weaker is None:
            raise ValueError("autoguidance needs a weaker network; give it to from_pipe by its name, as unet_weaker=.")
        positive = predictions["positive"]
        return guess + (per_image(scale, guess) - 1) * (positive - at.weaker(at.sampler.sample)), state

    return Guidance(combine)


def _away(name: str, kind: str, layers: Flags, strength: Callable[[At], jax.Array | float]) -> Guidance:
    """From the positive branch as it is when these blocks are hindered."""

    def branches(so_far: Branches) -> Branches:
        batch = len(jax.tree.leaves(so_far["positive"])[0])
        flags = tuple(jnp.broadcast_to(of_stack, (batch, of_stack.shape[-1])) for of_stack in layers)
        return {**so_far, name: {**so_far["positive"], "perturb": {kind: flags}}}

    def combine(state, guess, predictions: Predictions, at: At):
        return guess + per_image(strength(at), guess) * (predictions["positive"] - predictions[name]), state

    return Guidance(combine, branches=branches)


def levelled(branches: Branches) -> Branches:
    """Branches that all tell the network of the same kinds of hindrance; those that ask for none are told of zeros.

    >>> branches = {"positive": {"text": 1}, "pag": {"text": 1, "perturb": {"identity": (jnp.ones((1, 2)),)}}}
    >>> levelled(branches)["positive"]["perturb"]["identity"][0]
    Array([[0., 0.]], dtype=float32)
    """
    none = {kind: flags for cond in branches.values() for kind, flags in cond.get("perturb", {}).items()}
    if not none:
        return branches
    none = jax.tree.map(jnp.zeros_like, none)
    return {name: {**cond, "perturb": none | cond.get("perturb", {})} for name, cond in branches.items()}
