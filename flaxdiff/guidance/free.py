"""Rules without a second network: a prompt against its opposite, and what keeps a strong guess within bounds."""

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.guidance.rules import Guidance, per_image, stateless


def cfg(scale: jax.Array | float) -> Guidance:
    """Classifier-free guidance: negative + scale (positive - negative). Without a negative branch it changes nothing.

    Args:
      scale: one number, or one for each image; 1 is no guidance.

    >>> predictions = {"positive": jnp.float32(3), "negative": jnp.float32(1)}
    >>> float(cfg(2.0).combine((), predictions["positive"], predictions, None)[0])
    5.0

    Reference: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022.
    """

    def combine(guess, predictions):
        if "negative" not in predictions:
            return guess
        difference = predictions["positive"] - predictions["negative"]
        return guess + (per_image(scale, difference) - 1) * difference

    return stateless(combine)


def rescale(phi: jax.Array | float) -> Guidance:
    """Pull the spread of the guess towards that of the positive prediction, against overexposure.

    guess · (phi std(positive) / std(guess) + 1 - phi), deviations over each image.

    Args:
      phi: 0 changes nothing, 1 takes over the deviation entirely; the paper uses 0.7.

    >>> x = jnp.array([[1.0, -1.0]])
    >>> guess, _ = rescale(1.0).combine((), 4 * x, {"positive": x}, None)
    >>> guess
    Array([[ 1., -1.]], dtype=float32)

    Reference: Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed, 2023, section 3.4.
    """

    def combine(guess, predictions):
        spread = lambda x: jnp.std(x, tuple(range(1, x.ndim)), keepdims=True, ddof=1)
        ratio = spread(predictions["positive"]) / spread(guess)
        return guess * (1 + per_image(phi, guess) * (ratio - 1))

    return stateless(combine)


def together(rule: Guidance, other: str) -> Guidance:
    """A rule to which "negative" is the sum of what that branch and another say, of which each speaks of a part.

    >>> predictions = {"positive": jnp.ones(2), "negative": jnp.array([3.0, 0]), "rest": jnp.array([0, 2.0])}
    >>> together(cfg(2.0), "rest").combine((), predictions["positive"], predictions, None)[0]
    Array([-1.,  0.], dtype=float32)
    """

    def combine(state, guess, predictions, at):
        if other in predictions:
            predictions = {**predictions, "negative": predictions["negative"] + predictions[other]}
        return rule.combine(state, guess, predictions, at)

    return rule._replace(combine=combine)


def text_and_image(scale: jax.Array | float, image_scale: jax.Array | float) -> Guidance:
    """Guidance by a text and a picture: negative + scale (positive - image) + image_scale (image - negative).

    Args:
      scale: how closely to follow the text, which "positive" has beside the picture.
      image_scale: how closely to follow the picture, which "image" has alone; "negative" has neither.

    >>> predictions = {"positive": jnp.float32(4), "image": jnp.float32(2), "negative": jnp.float32(1)}
    >>> float(text_and_image(3.0, 2.0).combine((), predictions["positive"], predictions, None)[0])
    9.0

    Reference: Brooks et al., InstructPix2Pix: Learning to Follow Image Editing Instructions, 2023, section 3.2.1.
    """

    def combine(guess, predictions):
        if "negative" not in predictions:
            return guess
        negative, image, positive = (predictions[branch] for branch in ("negative", "image", "positive"))
        by_text, by_image = per_image(scale, positive), per_image(image_scale, positive)
        return guess + (by_text - 1) * (positive - image) + (by_image - 1) * (image - negative)

    return stateless(combine)


def apg(
    scale: jax.Array | float,
    eta: jax.Array | float = 1.0,
    threshold: jax.Array | float = 15.0,
    momentum: jax.Array | float = 0.0,
) -> Guidance:
    """Adaptive projected guidance: `cfg` whose difference D = positive - negative is tamed first.

    D̄ ← D + momentum D̄; shortened to a norm of at most `threshold`; split into a part along the positive prediction,
    which saturates colours, and the rest: negative + scale (rest + eta along).

    Args:
      scale: as of `cfg`.
      eta: how much to keep of what lies along the positive prediction.
      threshold: the largest norm of the difference, over each image; 0 for none.
      momentum: negative to move away from where the last differences led.

    >>> predictions = {"positive": jnp.array([[3.0, 0.0]]), "negative": jnp.array([[1.0, 1.0]])}
    >>> rule = apg(2.0, eta=0.0)
    >>> rule.combine(rule.init(predictions["positive"]), predictions["positive"], predictions, None)[0]
    Array([[ 1., -1.]], dtype=float32)

    Reference: Sadat et al., Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models, 2024.
    """

    def combine(state, guess, predictions, at):
        positive, negative = predictions["positive"], predictions["negative"]
        state = positive - negative + per_image(momentum, state) * state
        bound = per_image(threshold, state)
        short = jnp.where(bound > 0, jnp.minimum(1, bound / norm(state)), 1)
        along, rest = split(short * state, positive)
        update = per_image(scale, rest) * (rest + per_image(eta, along) * along)
        return guess + negative + update - positive, state

    return Guidance(combine, jnp.zeros_like)


def zero_star(scale: jax.Array | float, zero_steps: jax.Array | int = 1) -> Guidance:
    """CFG-Zero*: `cfg` with the negative prediction scaled to fit the positive one, and nothing at all at first.

    s = positive · negative / |negative|²; s negative + scale (positive - s negative), after `zero_steps` evaluations.

    >>> predictions = {"positive": jnp.array([[2.0, 0.0]]), "negative": jnp.array([[1.0, 1.0]])}
    >>> zero_star(3.0, 0).combine((), predictions["positive"], predictions, None)[0]
    Array([[ 4., -2.]], dtype=float32)

    Reference: Fan et al., CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models, 2025.
    """

    def combine(state, guess, predictions, at):
        positive, negative = predictions["positive"], predictions["negative"]
        fit = inner(positive, negative) / (inner(negative, negative) + 1e-8)
        guess = guess + (per_image(scale, guess) - 1) * (positive - fit * negative)
        return guess if at is None else jnp.where(at.sampler.index < zero_steps, 0, guess), state

    return Guidance(combine)


def tangential(scale: jax.Array | float) -> Guidance:
    """Tangential guidance: `cfg` with only that part of the negative prediction which both predictions share most.

    That is along the first singular direction of the two, side by side.

    >>> predictions = {"positive": jnp.array([[4.0, 0.0]]), "negative": jnp.array([[2.0, 0.0]])}
    >>> tangential(3.0).combine((), predictions["positive"], predictions, None)[0]
    Array([[8., 0.]], dtype=float32)

    Reference: Kwon et al., TCFG: Tangential Damping Classifier-free Guidance, 2025.
    """

    def combine(guess, predictions):
        positive, negative = predictions["positive"], predictions["negative"]
        # the leading eigenvector of the 2 x 2 matrix of inner products mixes the two into that direction
        a, b, c = inner(positive, positive), inner(positive, negative), inner(negative, negative)
        angle = jnp.arctan2(2 * b, a - c) / 2
        direction = jnp.cos(angle) * positive + jnp.sin(angle) * negative
        shared = split(negative, direction)[0]
        return guess + (per_image(scale, guess) - 1) * (positive - shared)

    return stateless(combine)


def frequency_decoupled(low: jax.Array | float, high: jax.Array | float) -> Guidance:
    """`cfg` with a strength for what is coarse in a picture and another for what is fine, two levels of a pyramid.

    Args:
      low: strength for the difference as it looks at half the size, which sets colours and layout.
      high: strength for the rest.

    >>> x = jnp.ones((1, 4, 4, 1))
    >>> guess, _ = frequency_decoupled(5.0, 10.0).combine((), x, {"positive": x, "negative": 0 * x}, None)
    >>> float(guess.mean())
    5.0

    Reference: Sadat et al., Guidance in the Frequency Domain Enables High-Fidelity Sampling at Low CFG Scales, 2025.
    """

    def combine(guess, predictions):
        difference = predictions["positive"] - predictions["negative"]
        down, across = (_coarse(side) for side in difference.shape[1:3])
        coarse = jnp.einsum("ih,bhwc,jw->bijc", down, difference, across)
        fine = per_image(high, guess) - 1
        return guess + fine * (difference - coarse) + (per_image(low, guess) - 1) * coarse

    return stateless(combine)


def _coarse(side: int) -> np.ndarray:
    """[side, side]: blur with 1 4 6 4 1, halve by means of two, double linearly, blur again; an odd side is padded."""
    n = side + side % 2
    blur, half, double = np.zeros((n, n)), np.zeros((n // 2, n)), np.zeros((n, n // 2))
    for i in range(n):
        for tap, weight in enumerate((1, 4, 6, 4, 1), -2):
            blur[i, n - 1 - abs(n - 1 - abs(i + tap))] += weight / 16  # mirrored at both ends
        half[i // 2, i] = 0.5
        double[i, i // 2] += 0.75
        double[i, np.clip(i // 2 + 2 * (i % 2) - 1, 0, n // 2 - 1)] += 0.25
    padded = np.eye(side)[np.minimum(np.arange(n), side - 1)]
    return (blur @ double @ half @ blur @ padded)[:side].astype(np.float32)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """The inner product over each image, [B, 1, …]."""
    return jnp.sum(a * b, tuple(range(1, a.ndim)), keepdims=True)


def norm(a: jax.Array) -> jax.Array:
    """The Euclidean norm over each image, [B, 1, …]."""
    return jnp.sqrt(inner(a, a))


def split(a: jax.Array, along: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The part of a that lies along another array, over each image, and the rest."""
    unit = along / jnp.maximum(norm(along), 1e-12)
    part = inner(a, unit) * unit
    return part, a - part
