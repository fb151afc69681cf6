"""What a network said at one step, used again at others: speed for a little of the likeness.

A `Cache` is a few pure functions, like a rule of guidance; what it keeps is carried from step to step in the state of
the run. A pipeline has a function of strengths, which are options of a call, that returns one:

    pipe.replace(cache=flaxdiff.caching.deep_cache)(params, key, prompt="…", cache_interval=3)
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from flaxdiff.nn.perturb import Given
from flaxdiff.nn.skipping import Skip


class Answer(NamedTuple):
    """What the network says at one evaluation.

    Attributes:
      predictions: branch -> its output [B, ...].
      seen: what it attended to, as a rule of guidance watches it; see `guidance.At`.
    """

    predictions: Mapping[str, jax.Array]
    seen: Any


class Network(Protocol):
    """The network at this evaluation, with all that it is told.

    Attributes:
      branches: the names of what it is asked.
      depths: of its stacks of blocks that attend.
      index: of the evaluation, [].
    """

    branches: tuple[str, ...]
    depths: tuple[int, ...]
    index: jax.Array

    def __call__(
        self, branches: Iterable[str] | None = None, notes: Iterable[str] = (), skip: Skip | None = None, **told: Any
    ) -> tuple[Answer, dict[str, list]]:
        """Ask.

        Args:
          branches: some of them; all by default.
          notes: the kinds of value to bring along, see `core.note`.
          skip: what decides whether its blocks are run.
          **told: instead of what the branches, side by side in one batch, tell it under these names.
        """


class Cache(NamedTuple):
    """A way to save work.

    Attributes:
      first: (memory, network) -> (answer, memory): the evaluation that fills the memory, which is None where only its
        shapes are wanted.
      later: (memory, network) -> (answer, memory): one that uses it.
      due: index of the evaluation [] -> bool: whether it is to be the first kind.
    """

    first: Callable[[Any, Network], tuple[Answer, Any]]
    later: Callable[[Any, Network], tuple[Answer, Any]]
    due: Callable[[jax.Array], jax.Array]


def blank(cache: Cache, network: Network) -> Any:
    """A memory with nothing in it, of the right shapes."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(lambda: cache.first(None, network)))


def evaluate(cache: Cache, kept: tuple[Answer, Any], network: Network) -> tuple[Answer, Any]:
    """The answer at an evaluation, and what is kept of it for the next."""

    def later(kept: tuple[Answer, Any]) -> tuple[Answer, Any]:
        answer, memory = cache.later(kept[1], network)
        return answer._replace(seen=kept[0].seen), memory

    return jax.lax.cond(cache.due(network.index), lambda kept: cache.first(kept[1], network), later, kept)


def deep_cache(cache_interval: jax.Array | float = 3) -> Cache:
    """Run a whole U-Net every so many evaluations, and between them its last block alone, on what came from below then.

    Reference: Ma et al., DeepCache: Accelerating Diffusion Models for Free, 2023.
    """

    def first(memory, network):
        answer, notes = network(notes=["up"])
        if not notes["up"]:
            raise ValueError("deep_cache is for U-Nets; use first_block for a transformer.")
        return answer, notes["up"][-1]

    return Cache(first, lambda deep, network: (network(deep=deep)[0], deep), _every(cache_interval))


def branch_cache(cache_interval: jax.Array | float = 3) -> Cache:
    """Ask all branches every so many evaluations, and between them the positive one: the others differ as they did."""

    def first(memory, network):
        answer, _ = network()
        positive = answer.predictions["positive"]
        return answer, {name: output - positive for name, output in answer.predictions.items()}

    def later(differences, network):
        answer, _ = network(["positive"])
        positive = answer.predictions["positive"]
        return Answer({name: positive + d for name, d in differences.items()}, answer.seen), differences

    return Cache(first, later, _every(cache_interval))


def tgate(gate_step: jax.Array | float = 10) -> Cache:
    """From some evaluation on, what the attentions to the text give stays as it was, and there is one branch.

    It is the mean over the branches. Guidance has nothing to compare from then on.

    Reference: Zhang et al., Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models, 2024.
    """

    def first(memory, network):
        answer, notes = network(notes=["cross"])
        if not network.depths or len(notes["cross"]) != sum(network.depths):
            raise ValueError("tgate is for networks whose blocks attend to a text apart; use first_block.")
        of_images = lambda a: a.reshape(-1, len(network.branches), *a.shape[1:]).mean(1)
        outputs = iter([of_images(a) for a in notes["cross"]])
        return answer, tuple(Given(jnp.stack([next(outputs) for _ in range(n)], 1)) for n in network.depths)

    def later(given, network):
        answer, _ = network(["positive"], text=given)
        return Answer(dict.fromkeys(network.branches, answer.predictions["positive"]), answer.seen), given

    return Cache(first, later, lambda index: index < jnp.asarray(gate_step).astype(index.dtype))


def first_block(threshold: jax.Array | float = 0.05) -> Cache:
    """Run the first block of a transformer, and the others only if it adds something else than when they last ran.

    If not, they are taken to add what they added then. Something else is a mean absolute difference of more than so
    large a share of what it added; there is one decision for all images and branches.

    Raises:
      ValueError: the network is no row of blocks, as a U-Net is not.

    Reference: Cheng, ParaAttention: First Block Cache, 2024.
    """

    def asked(memory: Any, network: Network) -> tuple[Answer, Any]:
        answer, notes = network(notes=["skipped"], skip=Skip(threshold, memory))
        if not notes["skipped"]:
            raise ValueError("first_block is for transformers that are rows of blocks; use deep_cache for a U-Net.")
        return answer, notes["skipped"][-1]

    return Cache(lambda memory, network: asked(None, network), asked, lambda index: index == 0)


ORDERS = 3  # derivatives that a Taylor series may have


def taylor_seer(
    cache_interval: jax.Array | float = 5,
    disable_cache_before_step: jax.Array | float = 3,
    max_order: jax.Array | float = 1,
) -> Cache:
    """Run the network every so many evaluations, and between them go on from what it said by a Taylor series.

    Σ_k y⁽ᵏ⁾ Δᵏ / k! over k up to max_order, at most 3, with derivatives by divided differences of the evaluations at
    which it ran. It always runs at the first few.

    Reference: Liu et al., From Reusable to Forecasting: Accelerating Diffusion Models with TaylorSeers, 2025; of what
    the network says as a whole, the lighter of its forms.
    """

    def first(memory, network):
        answer, _ = network()
        if memory is None:
            blank = lambda y: jnp.zeros((ORDERS + 1, *y.shape), y.dtype)
            memory = jax.tree.map(blank, dict(answer.predictions)), jnp.int32(0), jnp.int32(0)
        series, last, count = memory
        gap = jnp.maximum(network.index - last, 1)

        def renewed(y: jax.Array, old: jax.Array) -> jax.Array:
            new = [y]
            for order in range(ORDERS):  # a difference needs one evaluation more than the last
                new.append(jnp.where(count > order, (new[-1] - old[order]) / gap.astype(y.dtype), 0))
            return jnp.stack(new)

        series = {branch: renewed(y, series[branch]) for branch, y in answer.predictions.items()}
        return answer, (series, network.index.astype(jnp.int32), count + 1)

    def later(memory, network):
        series, last, _ = memory
        order, ahead = jnp.arange(ORDERS + 1), (network.index - last).astype(jnp.float32)
        factors = ahead ** order.astype(jnp.float32) / jnp.array(
            [math.factorial(k) for k in range(ORDERS + 1)], jnp.float32
        )
        factors = jnp.where(order <= jnp.asarray(max_order).astype(order.dtype), factors, 0)
        sums = {branch: jnp.tensordot(factors.astype(y.dtype), y, 1) for branch, y in series.items()}
        return Answer(sums, None), memory

    def due(index):
        before, interval = (jnp.asarray(n).astype(index.dtype) for n in (disable_cache_before_step, cache_interval))
        return (index < before) | ((index - before - 1) % jnp.maximum(interval, 1) == 0)

    return Cache(first, later, due)


def _every(interval: jax.Array | float) -> Callable[[jax.Array], jax.Array]:
    return lambda index: index % jnp.maximum(jnp.asarray(interval).astype(index.dtype), 1) == 0
