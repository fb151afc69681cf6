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

from flaxdiff.guidance.rules import Curve, Numbers
from flaxdiff.nn.perturb import Given
from flaxdiff.nn.reusing import Reuse
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
      steps: how many evaluations there are, [].
      timestep: of this one, [].
    """

    branches: tuple[str, ...]
    depths: tuple[int, ...]
    index: jax.Array
    steps: jax.Array
    timestep: jax.Array

    def __call__(
        self,
        branches: Iterable[str] | None = None,
        notes: Iterable[str] = (),
        skip: Skip | None = None,
        reuse: Reuse | None = None,
        **told: Any,
    ) -> tuple[Answer, dict[str, list]]:
        """Ask.

        Args:
          branches: some of them; all by default.
          notes: the kinds of value to bring along, see `core.note`.
          skip: what decides whether its blocks are run.
          reuse: what decides whether its attentions are computed.
          **told: instead of what the branches, side by side in one batch, tell it under these names.
        """


class Cache(NamedTuple):
    """A way to save work.

    Attributes:
      first: (memory, network) -> (answer, memory): the evaluation that fills the memory, which is None where only its
        shapes are wanted.
      later: (memory, network) -> (answer, memory): one that uses it.
      due: index of the evaluation [] -> bool: whether it is to be the first kind; None where the other sees to that
        itself, and finds a memory of zeros when the index is 0.
    """

    first: Callable[[Any, Network], tuple[Answer, Any]]
    later: Callable[[Any, Network], tuple[Answer, Any]]
    due: Callable[[jax.Array], jax.Array] | None = None


def blank(cache: Cache, network: Network) -> Any:
    """A memory with nothing in it, of the right shapes."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(lambda: cache.first(None, network)))


def evaluate(cache: Cache, kept: tuple[Answer, Any], network: Network) -> tuple[Answer, Any]:
    """The answer at an evaluation, and what is kept of it for the next."""
    if cache.due is None:
        return cache.later(kept[1], network)

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

    def decide(last: jax.Array, added: jax.Array, network: Network) -> Decision:
        return _share(added, last) <= threshold, last, added

    return _skipping("first_block", jnp.zeros_like, decide, leads=True)


# of the polynomial for Flux that is published with TeaCache, the highest power first
FLUX_COEFFICIENTS = Numbers([4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01])


def tea_cache(rel_l1_thresh: jax.Array | float = 0.25, coefficients: jax.Array | Numbers = FLUX_COEFFICIENTS) -> Cache:
    """Run the blocks of a transformer when what the first one reads has changed by enough since they last ran.

    What it reads are the tokens as time and text shift and scale them. Σ p(mean|mₙ - mₙ₋₁| / mean|mₙ₋₁|) over the
    evaluations since then, with the polynomial p that was fitted to what that says of the network's answer, is to
    stay below `rel_l1_thresh`. The first evaluation and the last are always whole. There is one decision for all
    images and branches.

    Raises:
      ValueError: the network is no row of blocks.

    Reference: Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, 2024.
    """

    def decide(memory: tuple[jax.Array, jax.Array], read: jax.Array, network: Network) -> Decision:
        last, total = memory
        total += jnp.polyval(jnp.asarray(coefficients, jnp.float32), _share(read, last))
        out = (total < rel_l1_thresh) & (network.index < network.steps - 1)
        return out, (read, total), (read, jnp.zeros_like(total))

    return _skipping("tea_cache", lambda read: (jnp.zeros_like(read), jnp.float32(0)), decide)


# how much more the blocks add than at the evaluation before, for Flux, as published with MagCache
FLUX_MAG_RATIOS = Curve(
    [1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562]
    + [1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359]
    + [0.89062]
)


def mag_cache(
    threshold: jax.Array | float = 0.06,
    max_skip_steps: jax.Array | float = 3,
    retention_ratio: jax.Array | float = 0.2,
    mag_ratios: jax.Array | Curve = Curve(),
) -> Cache:
    """Leave out the blocks of a transformer while what they add is known to keep its size.

    With γ the product of the ratios since they last ran, Σ |1 - γ| is to stay within the threshold, and the evaluations
    without them no more than so many in a row; within the first share of the run they are always run. How the size
    goes depends on the network, and little on the prompt: `magnitudes` measures it.

    Args:
      threshold, max_skip_steps, retention_ratio: the bounds.
      mag_ratios: the size of what the blocks add, as a multiple of what it was at the evaluation before, for each of a
        run; runs of other lengths take the nearest.

    Raises:
      ValueError: there are no ratios, or the network is no row of blocks.

    Reference: Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, 2025.
    """
    if isinstance(mag_ratios, Curve) and not mag_ratios:
        raise ValueError(
            "mag_cache needs mag_ratios, which depend on the network; give those that caching.magnitudes measures, or "
            "caching.FLUX_MAG_RATIOS."
        )

    nothing = jnp.float32(1), jnp.float32(0), jnp.float32(0)

    def decide(memory: tuple[jax.Array, ...], read: jax.Array, network: Network) -> Decision:
        product, error, count = memory
        product = product * jnp.asarray(mag_ratios, jnp.float32)[network.index]
        error, count = error + jnp.abs(1 - product), count + 1
        index, steps = (a.astype(jnp.float32) for a in (network.index, network.steps))
        out = (index >= jnp.floor(retention_ratio * steps + 0.5)) & (error <= threshold) & (count <= max_skip_steps)
        return out, (product, error, count), nothing

    return _skipping("mag_cache", lambda read: nothing, decide)


def magnitudes(pipe: Any, params: Mapping[str, Any], key: jax.Array, **options: Any) -> list[float]:
    """How the size of what a transformer's blocks add changes in a run: the `mag_ratios` of `mag_cache`.

    mean(‖rₙ‖ / ‖rₙ₋₁‖) for each evaluation, over tokens, images and branches; 1 for the first.

    Args:
      pipe, params, key, options: of a call, of as many steps as there are to be ratios.

    Raises:
      ValueError: the network is no row of blocks.

    Reference: Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, 2025.
    """
    measured = pipe.replace(cache=_measuring)
    inputs, program = measured.prepare_inputs(**options), measured.program
    inputs = program.prepared(type(program).generate, params, program.keys(key, inputs["index"]), inputs)
    conditions, state = jax.jit(program.begin)(params, key, inputs)
    step, ratios = jax.jit(program.step), []
    for _ in range(int(inputs["plan"].steps)):
        state = step(params, conditions, state)
        ratios.append(float(state.kept[1][0]))
    return ratios


def _measuring() -> Cache:
    """Leave nothing out, and keep how much more the blocks add than at the evaluation before."""

    def asked(memory, network):
        answer, (_, added) = _asked("magnitudes", network, Skip(lambda clue: (jnp.bool_(False), ()), None))
        if memory is None:
            return answer, (jnp.float32(0), added)
        size = lambda a: jnp.linalg.norm(a.astype(jnp.float32), axis=-1)
        ratio = (size(added) / (size(memory[1]) + 1e-8)).mean()
        return answer, (jnp.where(network.index == 0, 1, ratio), added)

    return Cache(asked, asked)


def pyramid_attention_broadcast(
    spatial_attention_block_skip_range: jax.Array | float = 2,
    cross_attention_block_skip_range: jax.Array | float = 1,
    spatial_attention_timestep_skip_range: jax.Array | Numbers = Numbers([100, 800]),
    cross_attention_timestep_skip_range: jax.Array | Numbers = Numbers([100, 800]),
) -> Cache:
    """Compute the attentions of a network's blocks every so many evaluations, and between them use what they gave.

    All around them is computed anew. At timesteps outside of the range they are always computed.

    Args:
      spatial_attention_block_skip_range: of attention of tokens to each other, joint with a text or not; 1 to compute
        it always.
      cross_attention_block_skip_range: of attention to a context.
      spatial_attention_timestep_skip_range, cross_attention_timestep_skip_range: between which times in [0, 1000].

    Raises:
      ValueError: the network has no blocks in a row.

    Reference: Zhao et al., Real-Time Video Generation with Pyramid Attention Broadcast, 2024.
    """

    def asked(memory, network):
        def same(every, between):
            t, (low, high) = jnp.asarray(network.timestep, jnp.float32), jnp.asarray(between, jnp.float32)
            return ~_every(every)(network.index) & (low < t) & (t < high)

        kinds = {
            "spatial": same(spatial_attention_block_skip_range, spatial_attention_timestep_skip_range),
            "cross": same(cross_attention_block_skip_range, cross_attention_timestep_skip_range),
        }
        reuse = Reuse(kinds, memory)
        answer, _ = network(reuse=reuse)
        if not reuse.new:
            raise ValueError("pyramid_attention_broadcast is for networks with blocks in a row; this one has none.")
        return answer, tuple(reuse.new)

    return Cache(asked, asked)


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


# --- what they share -------------------------------------------------------------------------------------------------

Decision = tuple[jax.Array, Any, Any]  # whether to leave the blocks out, and what to remember if so and if not


def _asked(name: str, network: Network, skip: Skip) -> tuple[Answer, Any]:
    """The answer where blocks may be left out, and what is remembered of them; `name` is the cache's, for the error."""
    answer, notes = network(notes=["skipped"], skip=skip)
    if not notes["skipped"]:
        raise ValueError(f"{name} is for transformers that are rows of blocks; use deep_cache for a U-Net.")
    return answer, notes["skipped"][-1]


def _skipping(
    name: str,
    blank: Callable[[jax.Array], Any],
    decide: Callable[[Any, jax.Array, Network], Decision],
    leads: bool = False,
) -> Cache:
    """A cache that leaves out blocks, by the clue that a `Skip` has; `blank` says what is remembered before a run."""

    def asked(memory: Any, network: Network) -> tuple[Answer, Any]:
        def decided(clue: jax.Array) -> tuple[jax.Array, Any]:
            out, *either = decide(blank(clue) if memory is None else memory[0], clue, network)
            out &= network.index > 0
            return out, jax.tree.map(lambda skipped, ran: jnp.where(out, skipped, ran), *either)

        return _asked(name, network, Skip(decided, None if memory is None else memory[1], leads))

    return Cache(asked, asked)


def _share(new: jax.Array, old: jax.Array) -> jax.Array:
    """By how much values have changed, as a share of what they were: mean|new - old| / mean|old|."""
    size = lambda a: jnp.abs(a.astype(jnp.float32)).mean()
    return size(new - old) / size(old)


def _every(interval: jax.Array | float) -> Callable[[jax.Array], jax.Array]:
    return lambda index: index % jnp.maximum(jnp.asarray(interval).astype(index.dtype), 1) == 0
