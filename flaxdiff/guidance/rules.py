"""Guidance as composable data: which branches a network is asked, and how their answers become one.

A `Guidance` is a few pure functions in the manner of optax. The loop evaluates the branches ("positive" and "negative"
prompt, …) in one batched call, then `combine` sees all predictions, and the guess so far, which is the positive one
before the first rule of a `chain`. Most rules add to the guess what they would change of the positive prediction, so
these may come in any order; those that scale the guess, such as `rescale`, come last. Strengths are values: they may be
traced, and may differ by image.

What a pipeline uses is a function of strengths: its parameters are what the call takes by these names, its result the
rule. Any function of a module does:

    def mine(guidance_scale, pag_scale=3.0, pag_applied_layers=Layers(["mid"])):
        return chain(apg(guidance_scale), pag(pag_scale, pag_applied_layers))

    pipe.replace(guidance=mine)(params, key, prompt="…", pag_scale=2.0)
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.core import Spec
from flaxdiff.schedulers.tables import SchedulerState

Predictions = Mapping[str, jax.Array]  # branch -> the network's output [B, ...], float32
Branches = Mapping[str, Mapping[str, Any]]  # branch -> what it tells the network
Pair = tuple[jax.Array, jax.Array]
Flags = tuple[jax.Array, ...]  # for each stack of blocks, which of them: [depth]


class At(NamedTuple):
    """Where a run stands when the network has answered.

    Attributes:
      sampler: the scheduler's state at this evaluation.
      branches: what each branch tells the network.
      ask: (sample [B, ...], names of branches) -> what the network says of another sample at this time, as
        `caching.Answer`: its predictions, and what is `seen` of that.
      decode: latents -> pictures [B, H, W, C] in [-1, 1].
      seen: for a rule that `watches`, what the network attended to: branch -> block -> the scaled queries
        [B, N, H, D] and the keys [B, M, H, D] of its attention to itself, and of that to the context.
      weaker: sample -> what a weaker network says of it in the positive branch, where the pipeline has one.
    """

    sampler: SchedulerState
    branches: Branches
    ask: Callable[[jax.Array, Iterable[str]], Any]
    decode: Callable[[jax.Array], jax.Array]
    seen: Mapping[str, Mapping[str, tuple[Pair, Pair]]] | None = None
    weaker: Callable[[jax.Array], jax.Array] | None = None


class Guidance(NamedTuple):
    """A rule.

    Attributes:
      combine: (state, guess, predictions, at) -> (guess, state).
      init: sample [B, ...] -> state, any pytree; what the rule remembers between steps.
      branches: branches -> branches: adds those that the rule asks for.
      watches: names of blocks -> those whose attention it reads.
      adjust: (sample [B, ...], at) -> the sample to go on from, before the network is asked.
    """

    combine: Callable[[Any, jax.Array, Predictions, At | None], tuple[jax.Array, Any]]
    init: Callable[[jax.Array], Any] = lambda sample: ()
    branches: Callable[[Branches], Branches] = lambda branches: branches
    watches: Callable[[list[str]], list[str]] = lambda names: []
    adjust: Callable[[jax.Array, At], jax.Array] = lambda sample, at: sample


def stateless(combine: Callable[[jax.Array, Predictions], jax.Array]) -> Guidance:
    """A rule that remembers nothing and looks at nothing but the predictions.

    >>> halve = stateless(lambda guess, predictions: guess / 2)
    >>> halve.combine((), jnp.ones(2), {}, None)
    (Array([0.5, 0.5], dtype=float32), ())
    """
    return Guidance(lambda state, guess, predictions, at: (combine(guess, predictions), state))


def chain(*rules: Guidance) -> Guidance:
    """Apply rules in order, each to the guess of the one before.

    >>> from flaxdiff.guidance import cfg, rescale
    >>> both = chain(cfg(7.5), rescale(0.7))
    >>> x = jnp.ones((1, 2, 2, 3))
    >>> guess, state = both.combine(both.init(x), x, {"positive": x, "negative": 0 * x}, None)
    >>> guess.shape
    (1, 2, 2, 3)
    """

    def combine(states, guess, predictions, at):
        new = []
        for rule, state in zip(rules, states):
            guess, state = rule.combine(state, guess, predictions, at)
            new.append(state)
        return guess, tuple(new)

    return Guidance(
        combine,
        lambda sample: tuple(rule.init(sample) for rule in rules),
        lambda branches: functools.reduce(lambda so_far, rule: rule.branches(so_far), rules, branches),
        lambda names: sorted({name for rule in rules for name in rule.watches(names)}),
        lambda sample, at: functools.reduce(lambda x, rule: rule.adjust(x, at), rules, sample),
    )


def interval(start: jax.Array | float, stop: jax.Array | float, *rules: Guidance) -> Guidance:
    """Rules that hold from one share of the run to another, and leave the guess alone before and after.

    What a rule tells the network, as `reference` does, it is told throughout.

    >>> from flaxdiff.guidance import cfg
    >>> interval(0.2, 0.8, cfg(7.5)).init(None)
    ((),)

    Reference: Kynkäänniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models, 2024.
    """
    rule = chain(*rules)

    def within(at: At, new: Any, old: Any) -> Any:
        i, n = (count.astype(jnp.float32) for count in (at.sampler.index, at.sampler.plan.steps))
        on = (i >= jnp.floor(start * n)) & (i < jnp.floor(stop * n))
        return jax.tree.map(lambda new, old: jnp.where(on, new, old), new, old)

    def combine(state, guess, predictions, at):
        return within(at, rule.combine(state, guess, predictions, at), (guess, state))

    def adjust(sample, at):
        new = rule.adjust(sample, at)
        return sample if new is sample else within(at, new, sample)

    return rule._replace(combine=combine, adjust=adjust)


def per_prompt(strengths: Mapping[str, jax.Array], n: int) -> dict[str, jax.Array]:
    """Strengths of the kind `Each`, [n] each. Raises ValueError where there is neither one nor n."""
    for name, values in strengths.items():
        if np.ndim(values) and len(values) not in (1, n):
            raise ValueError(f"{name} has {len(values)} values for {n} prompts; give one number, or one for each.")
    return {name: jnp.broadcast_to(jnp.asarray(values, jnp.float32), n) for name, values in strengths.items()}


def per_image(value: jax.Array | float, like: jax.Array) -> jax.Array:
    """A strength, one number or one for each image, in the shape that multiplies `like` [B, ...]."""
    value = jnp.asarray(value, like.dtype)
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value


# --- on the host -----------------------------------------------------------------------------------------------------


class Layers(tuple[str | int, ...]):
    """A strength that says which blocks of a network: regular expressions, each to be found in the names of some.

    Or whole numbers, of the blocks that have them in a row. Of none the rule is not told.
    """


class Numbers(tuple[float, ...]):
    """A strength that is several numbers, as many as there are by default."""


class Curve(tuple[float, ...]):
    """A strength that has a value for each evaluation of a run; given for a run of any length, nearest ones are taken.

    Of none the rule is not told.
    """

    def over(self, steps: int, rows: int) -> np.ndarray:
        """The values of a run of so many evaluations, in a table that is filled up with the last: [rows].

        >>> Curve([1.0, 2.0, 4.0]).over(5, 6)
        array([1., 1., 2., 4., 4., 4.], dtype=float32)
        """
        last = np.float32(len(self) - 1)
        places = np.round(np.arange(steps, dtype=np.float32) * (last / max(steps - 1, 1))) if steps > 1 else [last]
        return np.pad(np.asarray(self, np.float32)[np.asarray(places, int)], (0, rows - steps), mode="edge")


class Each(float):
    """A strength of which there may be one for each of some further prompts, or one for all; as [1 or prompts]."""


@functools.cache
def blocks(spec: Spec) -> tuple[tuple[str, ...], ...]:
    """The names of the blocks that attend, as the network's `blocks` has them: for each stack of equal ones, theirs."""
    return getattr(spec.module(spec.config), "blocks", ())


def chosen(spec: Spec, layers: str | Iterable[str | int]) -> tuple[np.ndarray, ...]:
    """Which blocks of a network some regular expressions name: for each stack, [depth] of 0 and 1.

    Args:
      layers: e.g. "mid", or ["down_blocks.1", r"up_blocks.0.attentions.[01]"]; also as "down.block_1", or [7, 8].

    Raises:
      ValueError: one that is no regular expression, or finds none; lists what there is.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> [int(flags.sum()) for flags in chosen(pipe.unet, "mid")]
    [0, 0, 1, 0, 0, 0, 0]
    """
    names = blocks(spec)
    layers = [layers] if isinstance(layers, str) else list(layers)
    layers = [rf"\.{layer}\.attn1" if isinstance(layer, int) else layer for layer in layers]
    for layer in layers:
        try:
            found = any(re.search(layer, f"{name}.attn1") for stack in names for name in stack)
        except re.error as e:
            raise ValueError(f"{layer!r} is no regular expression: {e}.") from None
        if not found:
            there = ", ".join(name for stack in names for name in stack) or "none that can be chosen"
            raise ValueError(f"No layer of {spec.module.__name__} has {layer!r} in its name; there are: {there}.")
    named = lambda name: any(re.search(layer, f"{name}.attn1") for layer in layers)
    return tuple(np.float32([named(name) for name in stack]) for stack in names)


def strengths(
    rule: Callable[..., Any],
    spec: Spec | None,
    given: Mapping[str, Any],
    batch: int,
    steps: int = 1,
    rows: int = 1,
) -> dict[str, np.ndarray | Flags]:
    """The strengths that a guidance, or a cache, takes as arrays: from what is given by their names, or their defaults.

    Args:
      rule: the function of strengths.
      spec: of the network, for those that name its layers.
      given: name -> number, or one for each of `batch` images.
      steps, rows: evaluations of the run, and of the table that they stand in, for a `Curve`.

    Raises:
      ValueError: a list of another length.
    """
    arrays: dict[str, Any] = {}
    for name, parameter in inspect.signature(rule).parameters.items():
        value = given.get(name, parameter.default)
        if value is None or value is inspect.Parameter.empty:
            continue
        if isinstance(parameter.default, Layers):
            layers = [value] if isinstance(value, str | int) else list(value)
            arrays |= {name: chosen(spec, layers)} if layers else {}
            continue
        arrays[name] = np.asarray(value, np.float32)
        if isinstance(parameter.default, Curve | Numbers) and arrays[name].ndim != 1:
            raise ValueError(f"{name} has shape {[*arrays[name].shape]}; give a list of numbers.")
        if isinstance(parameter.default, Curve):
            values = Curve(arrays.pop(name).tolist())
            arrays |= {name: values.over(steps, rows)} if values else {}
        elif isinstance(parameter.default, Numbers):
            if len(arrays[name]) != len(parameter.default):
                raise ValueError(f"{name} has {len(arrays[name])} numbers; give {len(parameter.default)}.")
        elif isinstance(parameter.default, Each):
            arrays[name] = np.atleast_1d(arrays[name])
        elif arrays[name].ndim > 1 or arrays[name].ndim and len(arrays[name]) not in (1, batch):
            shape = list(arrays[name].shape)
            raise ValueError(f"{name} has shape {shape} for {batch} images; give one number, or one for each.")
    return arrays
