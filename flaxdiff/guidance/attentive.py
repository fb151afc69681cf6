"""Rules that read what the network attends to."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.guidance.rules import At, Guidance, Pair, Predictions, chain, per_image
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
        away = predictions[branch] - at.ask(degraded, [branch]).predictions[branch]
        return guess + per_image(scale, guess) * away, state

    return Guidance(combine, watches=lambda names: [middle(names)])


def excite(
    tokens: jax.Array | None,
    steps: jax.Array,
    thresholds: jax.Array,
    max_iter_to_alter: jax.Array | float = 25,
    scale_factor: jax.Array | float = 20,
) -> Guidance:
    """Attend-and-Excite: move the sample until each of some tokens has a place that attends to it.

    The loss is 1 - the largest attention that the most neglected token gets anywhere, averaged over the blocks at a
    quarter of the sample's sides and smoothed. Its gradient is followed once before each of the first evaluations, and
    at some of them until the attention is above a threshold, up to twenty times.

    Args:
      tokens: [B, M] of 0 and 1: which; None for none, which changes nothing.
      steps, thresholds: [B, K]: at which evaluations to go on, and until when.
      max_iter_to_alter: evaluations that the sample is moved before.
      scale_factor: how far, falling to half of its square over the run.

    Reference: Chefer et al., Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models,
    2023.
    """

    def adjust(x: jax.Array, at: At) -> jax.Array:
        i, n = (count.astype(jnp.float32) for count in (at.sampler.index, at.sampler.plan.steps))
        size = jnp.asarray(scale_factor) * jnp.sqrt(1 - i / 2 / jnp.maximum(n - 1, 1))
        due = steps == i
        most = jnp.where(due.any(-1), 1 - jnp.where(due, thresholds, 0).sum(-1), jnp.inf)

        def neglect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses = 1 - attention(at.ask(x, ["positive"]).seen["positive"], x.shape[1:3])
            losses = (jnp.maximum(losses, 0) * tokens).max(-1)
            return losses.sum(), losses

        slope = jax.grad(neglect, has_aux=True)

        def refine(carry):
            x, losses, count = carry
            down, new = slope(x)
            return jnp.where(per_image(losses > most, x), x - per_image(size, x) * down, x), new, count + 1

        def move(x: jax.Array) -> jax.Array:
            start = x, neglect(x)[1], 0
            x, *_ = jax.lax.while_loop(lambda c: (c[1] > most).any() & (c[2] < 20), refine, start)
            return jnp.where(i < jnp.asarray(max_iter_to_alter), x - per_image(size, x) * slope(x)[0], x)

        at_all = due.any() | (i < jnp.asarray(max_iter_to_alter))
        return jax.lax.cond(at_all, move, lambda x: x, x)

    if tokens is None:
        return chain()
    return Guidance(lambda state, guess, *_: (guess, state), watches=lambda names: names, adjust=adjust)


def pix2pix_zero(amount: jax.Array | float = 0.1) -> Guidance:
    """Move each sample so that it attends to its text as the first image of the batch does to its own.

    x - amount ∇ Σ |maps - the first's|², the mean over heads, summed over blocks; before each evaluation. With the same
    noise for all, the first is kept and the others are what their prompts make of it. Of a picture, that noise is found
    by `invert`; a prompt may be the first's embedding and the way from one word's to another's.

    Reference: Parmar et al., Zero-shot Image-to-Image Translation, 2023.
    """

    def adjust(x: jax.Array, at: At) -> jax.Array:
        def apart(x: jax.Array) -> jax.Array:
            maps = [probabilities(to_text) for _, to_text in at.ask(x, ["positive"]).seen["positive"].values()]
            return sum(jnp.square(m - jax.lax.stop_gradient(m[:1])).sum((2, 3)).mean(1).sum() for m in maps)

        return x - per_image(amount, x) * jax.grad(apart)(x)

    return Guidance(lambda state, guess, *_: (guess, state), watches=lambda names: names, adjust=adjust)


def attention(seen: Mapping[str, tuple[Pair, Pair]], sides: tuple[int, int]) -> jax.Array:
    """The most that any position attends to each token, smoothed: [B, M]; the first and the last token have none.

    Of the blocks that `at_a_quarter` is about.
    """
    maps = at_a_quarter([cross for _, cross in seen.values()], sides)
    maps = jax.nn.softmax(100 * maps[..., 1:-1])
    maps = smoothed(maps.reshape(len(maps), *grid(maps.shape[1], sides), -1))
    return jnp.pad(maps.max((1, 2)), ((0, 0), (1, 1)))


def at_a_quarter(pairs: list[Pair], sides: tuple[int, int]) -> jax.Array:
    """How much each query looks at each key, the mean over heads and blocks: [B, N, M].

    Of the blocks at a quarter of the sample's sides, or the next larger resolution that there is.
    """
    least = math.prod(-(-side // 4) for side in sides)
    tokens = min(q.shape[1] for q, _ in pairs if q.shape[1] >= least)
    return sum(of := [weights(pair) for pair in pairs if pair[0].shape[1] == tokens]) / len(of)


def smoothed(maps: jax.Array) -> jax.Array:
    """Maps [B, H, W, M] under a small bell, exp(-x^2) over three positions along each side."""
    bell = np.exp(-np.square(np.arange(-1, 2.0)))
    for axis in (1, 2):
        around = jnp.pad(maps, [(int(a == axis),) * 2 for a in range(4)], mode="reflect")
        cut = [jax.lax.slice_in_dim(around, j, j + maps.shape[axis], axis=axis) for j in range(3)]
        maps = sum(float(w) * a for w, a in zip(bell / bell.sum(), cut))
    return maps


def middle(names: list[str]) -> str:
    """The first block of the lowest resolution, or the one half way."""
    return next((name for name in names if name.startswith("mid")), names[len(names) // 2])


def probabilities(pair: Pair) -> jax.Array:
    """How much each query looks at each key, [B, H, N, M]."""
    return jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", *pair, preferred_element_type=jnp.float32))


def weights(pair: Pair) -> jax.Array:
    """How much each query looks at each key, the mean over heads: [B, N, M]."""
    return probabilities(pair).mean(1)


def received(pair: Pair, sides: tuple[int, int]) -> jax.Array:
    """How much each position of a sample is looked at, all queries together: [B, H, W]; 1 on average."""
    seen = weights(pair).sum(1)
    return enlarged(seen.reshape(-1, *grid(seen.shape[-1], sides)), sides)


def enlarged(maps: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Maps [B, h, w, …] at a sample's size, each place as the nearest has it."""
    rows, columns = (np.arange(side) * n // side for side, n in zip(sides, maps.shape[1:3]))
    return maps[:, rows][:, :, columns]


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
