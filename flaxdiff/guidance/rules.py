"""Guidance as composable data: which branches a network is asked, and how their answers become one.

A `Guidance` is a pair of pure functions in the manner of optax. The loop evaluates the branches ("positive" and
"negative" prompt, …) in one batched call, then `combine` sees all predictions, and the guess so far, which is the
positive one before the first rule of a `chain`. Strengths are values: they may be traced, and may differ by image.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Predictions = Mapping[str, jax.Array]  # branch -> the network's output [B, ...], float32


class Guidance(NamedTuple):
    """A rule.

    Attributes:
      init: sample [B, ...] -> state, any pytree; what the rule remembers between steps.
      combine: (state, guess, predictions) -> (guess, state).
    """

    init: Callable[[jax.Array], Any]
    combine: Callable[[Any, jax.Array, Predictions], tuple[jax.Array, Any]]


def stateless(combine: Callable[[jax.Array, Predictions], jax.Array]) -> Guidance:
    """A rule that remembers nothing.

    >>> halve = stateless(lambda guess, predictions: guess / 2)
    >>> halve.combine((), jnp.ones(2), {})
    (Array([0.5, 0.5], dtype=float32), ())
    """
    return Guidance(lambda sample: (), lambda state, guess, predictions: (combine(guess, predictions), state))


def chain(*rules: Guidance) -> Guidance:
    """Apply rules in order, each to the guess of the one before.

    >>> both = chain(cfg(7.5), rescale(0.7))
    >>> x = jnp.ones((1, 2, 2, 3))
    >>> guess, state = both.combine(both.init(x), x, {"positive": x, "negative": 0 * x})
    >>> guess.shape
    (1, 2, 2, 3)
    """

    def combine(states, guess, predictions):
        new = []
        for rule, state in zip(rules, states):
            guess, state = rule.combine(state, guess, predictions)
            new.append(state)
        return guess, tuple(new)

    return Guidance(lambda sample: tuple(rule.init(sample) for rule in rules), combine)


def per_image(value: jax.Array | float, like: jax.Array) -> jax.Array:
    """A strength, one number or one for each image, in the shape that multiplies `like` [B, ...]."""
    value = jnp.asarray(value, like.dtype)
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value


def cfg(scale: jax.Array | float) -> Guidance:
    """Classifier-free guidance: negative + scale (positive - negative).

    Args:
      scale: one number, or one for each image; 1 is no guidance.

    >>> guess, _ = cfg(2.0).combine((), None, {"positive": jnp.float32(3), "negative": jnp.float32(1)})
    >>> float(guess)
    5.0

    Reference: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022.
    """

    def combine(guess, predictions):
        negative, positive = predictions["negative"], predictions["positive"]
        return negative + per_image(scale, positive) * (positive - negative)

    return stateless(combine)


def rescale(phi: jax.Array | float) -> Guidance:
    """Pull the spread of the guess towards that of the positive prediction, against overexposure.

    guess · (phi std(positive) / std(guess) + 1 - phi), deviations over each image.

    Args:
      phi: 0 changes nothing, 1 takes over the deviation entirely; the paper uses 0.7.

    >>> x = jnp.array([[1.0, -1.0]])
    >>> guess, _ = rescale(1.0).combine((), 4 * x, {"positive": x})
    >>> guess
    Array([[ 1., -1.]], dtype=float32)

    Reference: Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed, 2023, section 3.4.
    """

    def combine(guess, predictions):
        spread = lambda x: jnp.std(x, tuple(range(1, x.ndim)), keepdims=True, ddof=1)
        ratio = spread(predictions["positive"]) / spread(guess)
        return guess * (1 + per_image(phi, guess) * (ratio - 1))

    return stateless(combine)


def text_and_image(scale: jax.Array | float, image_scale: jax.Array | float) -> Guidance:
    """Guidance by a text and a picture: negative + scale (positive - image) + image_scale (image - negative).

    Args:
      scale: how closely to follow the text, which "positive" has beside the picture.
      image_scale: how closely to follow the picture, which "image" has alone; "negative" has neither.

    >>> predictions = {"positive": jnp.float32(4), "image": jnp.float32(2), "negative": jnp.float32(1)}
    >>> float(text_and_image(3.0, 2.0).combine((), None, predictions)[0])
    9.0

    Reference: Brooks et al., InstructPix2Pix: Learning to Follow Image Editing Instructions, 2023, section 3.2.1.
    """

    def combine(guess, predictions):
        negative, image, positive = (predictions[branch] for branch in ("negative", "image", "positive"))
        by_text, by_image = per_image(scale, positive), per_image(image_scale, positive)
        return negative + by_text * (positive - image) + by_image * (image - negative)

    return stateless(combine)


def standard(strengths: Mapping[str, jax.Array]) -> Guidance:
    """What pipelines use unless told otherwise: `cfg` with `guidance_scale`, then `rescale` with `guidance_rescale`.

    With an `image_guidance_scale` beside them, `text_and_image` in place of `cfg`.
    """
    scale = strengths["guidance_scale"]
    image_scale = strengths.get("image_guidance_scale")
    rule = cfg(scale) if image_scale is None else text_and_image(scale, image_scale)
    return chain(rule, rescale(strengths["guidance_rescale"]))
