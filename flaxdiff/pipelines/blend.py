"""Inpainting with any network: what the mask leaves alone is put back after every step, as noisy as the sample is.

Reference: Avrahami et al., Blended Latent Diffusion, 2022.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxdiff.schedulers.tables import SchedulerState, folded


class Known(NamedTuple):
    """What is known of the result."""

    mask: jax.Array  # [B, h, w, 1]: 1 where to paint, 0 where the latents are known
    latents: jax.Array  # [B, h, w, C]
    noise: jax.Array  # [B, h, w, C], the run's own; or in its place
    keys: jax.Array | None = None  # [B] of which each step draws its own


class Passed(NamedTuple):
    """What is known of the whole run."""

    mask: jax.Array  # [B, h, w, 1], as above
    path: jax.Array  # [B, n, h, w, C]: where another run passed, one sample before each evaluation


def blend(state: SchedulerState, known: Known | Passed) -> SchedulerState:
    """mask x + (1 - mask) (alpha known + sigma noise), at the level that the step has led to; after the last, no noise.

    Where each step draws noise of its own, nothing is put back after the last. Of a path it is the sample at the
    level that the step came from, as DiffEdit has it.

    >>> from flaxdiff.schedulers import DDIMScheduler, tables
    >>> state = tables.init(DDIMScheduler().plan(1), jnp.zeros((1, 2, 2, 3)), jax.random.key(0))
    >>> state = tables.step(state, jnp.zeros((1, 2, 2, 3)))
    >>> one = jnp.ones((1, 2, 2, 3))
    >>> float(blend(state, Known(jnp.zeros((1, 2, 2, 1)), one, one)).sample.mean())
    1.0
    """
    plan, i = state.plan, state.index
    if isinstance(known, Passed):
        there, mask = known.path[:, i - 1], known.mask
    else:
        done = i >= plan.steps
        alpha, sigma = jnp.where(done, 1, plan.alpha[i]), jnp.where(done, 0, plan.sigma[i])
        noise, mask = known.noise, known.mask
        if known.keys is not None:
            keys, mask = folded(known.keys, i), jnp.where(done, 1, mask)
            noise = jax.vmap(lambda key: jax.random.normal(key, noise.shape[1:]))(keys)
        there = alpha * known.latents + sigma * noise
    return state.moved(mask * state.sample + (1 - mask) * there)
