"""Rules that read what the network attends to."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.guidance.rules import At, Guidance, Pair, Predictions, per_image
from flaxdiff.nn.perturb import blurred


def sag(scale: jax.Array | float) -> Guidance:
    """Self-attention guidance: away from what the network says where the sample is blurred, in the places it looks at.

    guess + scale (plain - degraded), where plain is the negative prediction, or the positive one alone. Its x_0 is
    blurred where the middle of the network attends more than on average, put under its noise again, and asked about.

    Reference: Hong et al., Improving Sample Quality of Diffusion Models Using Self-Attention Guidance, 2023.
    """

    def combine(state, guess, predictions: Predictions, at: At):
        branch = "negative" if "negative" in predictions else "positive"
        plan, i, x = at.sampler.plan, at.sampler.index, at.sampler.sample
        x0 = plan.x0_sample[i] * x + plan.x0_output[i] * predictions[branch]
        noise = (x - plan.alpha[i] * x0) / plan.sigma[i]
        looked = received(at.seen[branch][middle(list(at.seen[branch]))][0], x.shape[1:3]) > 1
        smooth = blurred(x0.reshape(len(x), -1, x.shape[-1]), jnp.ones(len(x)), x.shape[1:3], 4).reshape(x.shape)
        degraded = plan.alpha[i] * jnp.where(looked[..., None], smooth, x0) + plan.sigma[i] * noise
        away = predictions[branch] - at.ask(degraded, [branch])[branch]
        return guess + per_image(scale, guess) * away, state

    return Guidance(combine, watches=lambda names: [middle(names)])


def middle(names: list[str]) -> str:
    """The first block of the lowest resolution, or the one half way."""
    return next((name for name in names if name.startswith("mid")), names[len(names) // 2])


def weights(pair: Pair) -> jax.Array:
    """How much each query looks at each key, the mean over heads: [B, N, M]."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", *pair, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores).mean(1)


def received(pair: Pair, sides: tuple[int, int]) -> jax.Array:
    """How much each position of a sample is looked at, all queries together: [B, H, W]; 1 on average."""
    seen = weights(pair).sum(1)
    rows, columns = grid(seen.shape[-1], sides)
    at = [np.arange(side) * n // side for side, n in zip(sides, (rows, columns))]
    return seen.reshape(-1, rows, columns)[:, at[0]][:, :, at[1]]


def grid(tokens: int, sides: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns of so many tokens of a sample, each side halved as often as it takes.

    >>> grid(15, (20, 10))
    (5, 3)
    """
    rows, columns = sides
    while rows * columns > tokens:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    if rows * columns != tokens:
        raise ValueError(f"{tokens} tokens do not come from a sample of {sides} by halves.")
    return rows, columns
