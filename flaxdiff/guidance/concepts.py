"""Rules with prompts beside the prompt: towards or away from what they say, where it matters.

Each further prompt is a branch of its own, "editing_00", …, or "safety_00".
"""

import jax
import jax.numpy as jnp

from flaxdiff.guidance.attentive import at_a_quarter, enlarged, grid, smoothed
from flaxdiff.guidance.rules import At, Guidance, Predictions, chain, per_image, per_prompt
from flaxdiff.schedulers.tables import quantile


def safe(
    guidance_scale: jax.Array | float,
    scale: jax.Array | float = 1000.0,
    warmup_steps: jax.Array | float = 10,
    threshold: jax.Array | float = 0.01,
    momentum_scale: jax.Array | float = 0.3,
    mom_beta: jax.Array | float = 0.4,
) -> Guidance:
    """Safe latent diffusion: away from a concept, where the prediction nears it, after some steps.

    mu = min(1, |scale (positive - safety)|) where positive - safety < threshold, else 0
    gamma = mu (safety - negative) + momentum_scale nu,  nu <- mom_beta nu + (1 - mom_beta) gamma
    guess - guidance_scale gamma

    Args:
      guidance_scale: that of `cfg`, which gamma belongs to.

    Reference: Schramowski et al., Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models,
    2023.
    """

    def combine(nu, guess, predictions: Predictions, at: At):
        if "negative" not in predictions:
            return guess, nu
        positive, negative, concept = (predictions[b] for b in ("positive", "negative", "safety_00"))
        by = lambda value: per_image(value, guess)
        mu = jnp.where(positive - concept >= by(threshold), 0, jnp.minimum(jnp.abs(positive - concept) * by(scale), 1))
        gamma = mu * (concept - negative) + by(momentum_scale) * nu
        nu = by(mom_beta) * nu + (1 - by(mom_beta)) * gamma
        warm = at.sampler.index.astype(jnp.float32) >= jnp.asarray(warmup_steps)
        return guess - jnp.where(warm, by(guidance_scale), 0) * gamma, nu

    return Guidance(combine, jnp.zeros_like)


def sega(
    momentum_scale: jax.Array | float = 0.1, mom_beta: jax.Array | float = 0.4, **of_prompts: jax.Array
) -> Guidance:
    """Semantic guidance: towards further prompts, or away from them, where they differ most from the negative one.

    For each, gamma = ± scale (editing - negative), kept where its size is above a quantile over the positions; summed
    with their weights, with momentum once all have warmed up.

    Args:
      momentum_scale, mom_beta: of the running mean that is added, and how slowly it changes.
      **of_prompts: for each prompt, or for all, [1 or prompts]: `edit_guidance_scale`, `edit_threshold` (the quantile),
        `edit_weights`, `edit_warmup_steps` and `edit_cooldown_steps` (evaluations without it before, and after),
        `reverse_editing_direction` (1 for away).

    Raises:
      ValueError: neither one value nor one for each prompt.

    Reference: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, 2023.
    """

    def combine(nu, guess, predictions: Predictions, at: At):
        names = sorted(name for name in predictions if name.startswith("editing_"))
        if "negative" not in predictions or not names:
            return guess, nu
        c, i = per_prompt(of_prompts, len(names)), at.sampler.index.astype(jnp.float32)
        warm, cool = i >= c["edit_warmup_steps"], i >= c["edit_cooldown_steps"]
        signed = jnp.where(c["reverse_editing_direction"] > 0, -1, 1) * c["edit_guidance_scale"]
        gammas = jnp.stack([predictions[name] - predictions["negative"] for name in names])
        gammas *= signed.reshape(-1, *(1,) * guess.ndim)

        def salient(gamma, share):
            least = quantile(jnp.abs(gamma), share, range(1, gamma.ndim - 1))
            return jnp.where(jnp.abs(gamma) >= least, gamma, 0)

        gammas = jax.vmap(salient)(gammas, c["edit_threshold"])
        weights = jnp.where(cool, 0, jnp.maximum(c["edit_weights"], 0))
        some = jnp.where(warm, weights, 0)
        some = jnp.tensordot(some / jnp.maximum(some.sum(), 1e-12), gammas, 1)
        every = jnp.tensordot(weights, gammas, 1) + per_image(momentum_scale, guess) * nu
        nu = per_image(mom_beta, guess) * nu + (1 - per_image(mom_beta, guess)) * every
        return guess + jnp.where(warm.all(), every, jnp.where(warm.any(), some, 0)), nu

    return Guidance(combine, jnp.zeros_like)


def ledits(
    tokens: jax.Array | None,
    mask: jax.Array | float = 1.0,
    by_attention: jax.Array | float = 0.0,
    intersect: jax.Array | float = 1.0,
    alone_above: jax.Array | float = 800,
    **of_prompts: jax.Array,
) -> Guidance:
    """LEDITS++: towards further prompts, or away from them, where the network attends to them and where they matter.

    guess ± sum over prompts of mask scale (editing - positive). The mask is 1 where the words are attended to more than
    at a share of the places, and where the difference, summed over channels, is larger than at that share of them.

    Args:
      tokens: [B, prompts, M] of 0 and 1: which are of each prompt's words; None for no further prompts.
      mask: [B, h, w, 1] to multiply by.
      by_attention, intersect: which masks hold: the first alone, both (whatever the former is), or, where both are 0,
        the second alone.
      alone_above: the time above which the first holds alone where both would.
      **of_prompts: for each prompt, or for all, [1 or prompts]: `edit_guidance_scale`, `edit_threshold` (that share),
        `edit_warmup_steps` and `edit_cooldown_steps` (evaluations without it before, and after),
        `reverse_editing_direction` (1 for away).

    Raises:
      ValueError: neither one value nor one for each prompt.

    Reference: Brack et al., LEDITS++: Limitless Image Editing using Text-to-Image Models, 2024.
    """

    def combine(state, guess, predictions: Predictions, at: At):
        names = sorted(name for name in predictions if name.startswith("editing_"))
        c, i, t = per_prompt(of_prompts, len(names)), at.sampler.index.astype(jnp.float32), at.sampler.timestep
        on = (i >= c["edit_warmup_steps"]) & (i < c["edit_cooldown_steps"])
        signed = jnp.where(on, jnp.where(c["reverse_editing_direction"] > 0, -1, 1) * c["edit_guidance_scale"], 0)
        both, first = jnp.asarray(intersect) > 0, jnp.asarray(by_attention) > 0
        for n, name in enumerate(names):
            gamma = signed[n] * (predictions[name] - predictions["positive"]) * mask
            size = jnp.abs(gamma).sum(-1, keepdims=True)
            matters = size >= jnp.quantile(size, c["edit_threshold"][n], axis=(1, 2), keepdims=True)
            looked = attended(at.seen[name], tokens[:, n], c["edit_threshold"][n], guess.shape[1:3])
            where = jnp.where(
                both & (t <= jnp.asarray(alone_above)), looked & matters, jnp.where(both | first, looked, matters)
            )
            guess = guess + jnp.where(where, gamma, 0)
        return guess, state

    if tokens is None:
        return chain()
    return Guidance(combine, watches=lambda names: [name for name in names if not name.startswith("mid")])


def attended(seen, tokens: jax.Array, share: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Where some tokens [B, M] are attended to more than at a share of the places: [B, H, W, 1]."""
    maps = jnp.einsum("bnm,bm->bn", at_a_quarter([cross for _, cross in seen.values()], sides), tokens)
    maps = smoothed(maps.reshape(len(maps), *grid(maps.shape[1], sides), 1))
    return enlarged(maps >= jnp.quantile(maps, share, axis=(1, 2), keepdims=True), sides)
