"""A scheduler as a table of numbers, and the one function that runs every such table on the device.

On the host `tabulate` runs a solver once on the vectors of a basis and keeps its coefficients: a `Plan`. On the device
`init` makes a `SchedulerState` and `step` advances it by one network evaluation. Whatever tells schedulers and step
counts apart is a value in the plan, so a program compiled for one of them serves them all. Plans of other kinds, such
as those for tokens, start and advance a `Run`; `init` and `step` ask the plan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .path import Grid, Prediction

# The arrays carried between evaluations, the sample first. Five suffice for every solver here; sharing one number is
# what lets them share a compiled program.
SLOTS = 5

Array = jax.Array | np.ndarray


class Plan(NamedTuple):
    """One run of a scheduler: n rows, one a network evaluation, all float32 but `noisy` and `steps`.

    Rows from `steps` on are padding and leave the state as it is. The step at row i is
    slots <- mix[i] @ (slots, x_0, network output, noise), after x_0 = x0_sample[i] slots[0] + x0_output[i] output.
    """

    timesteps: Array  # [n] what the network is told
    scale: Array  # [n] model_input = scale * sample
    alpha: Array  # [n] sample = alpha x_0 + sigma noise
    sigma: Array  # [n]
    x0_sample: Array  # [n]
    x0_output: Array  # [n]
    clip: Array  # [n] bound on |x_0|, infinite when off
    threshold: Array  # [n, 2] dynamic thresholding: quantile (0 when off) and largest bound
    variance: Array  # [n, 2] learned variance: log of its range, and 1 where the output is the variance itself
    mix: Array  # [n, SLOTS, SLOTS + 3]
    noisy: Array  # [n] bool: does the row use noise?
    init_noise_sigma: Array  # [] standard deviation of the sample that a run from pure noise starts with
    steps: Array  # [] int32, rows in use

    def pad(self, rows: int) -> Plan:
        """The same plan in a table of `rows` rows, so that plans of different length share a compiled program.

        >>> from flaxdiff.schedulers import DDIMScheduler
        >>> plan = DDIMScheduler().plan(4).pad(10)
        >>> plan.timesteps.shape, int(plan.steps)
        ((10,), 4)
        """
        idle = np.eye(SLOTS, SLOTS + 3, dtype=np.float32)
        return padded(self, rows, {"scale": 1, "alpha": 1, "clip": np.inf, "mix": idle})

    def start(self, latents: jax.Array, keys: jax.Array) -> SchedulerState:
        """The state before the first evaluation; `latents` as of `init`, one key for each image."""
        x = jnp.asarray(latents, jnp.float32)
        slots = jnp.concatenate([x[None], jnp.zeros((SLOTS - 1, *x.shape), x.dtype)])
        return SchedulerState(self, slots, jnp.zeros((), jnp.int32), keys)

    def advance(self, state: SchedulerState, model_output: jax.Array, noise: jax.Array | None) -> SchedulerState:
        """The state after this evaluation: slots <- mix @ (slots, x_0, output, noise).

        Args:
          model_output: [B, ...] in the prediction type of the scheduler's config; twice the channels if it predicts a
            variance too.
          noise: [B, ...] unit noise to use; by default image b at evaluation i gets normal(fold_in(key[b], i)).
        """
        i, x = state.index, state.sample
        x0, out, spread = _predictions(state, model_output)
        if noise is None:
            noise = jax.lax.cond(self.noisy[i], draw(state.key, i), jnp.zeros_like, x)
        terms = jnp.concatenate([state.slots, jnp.stack([x0, out, spread * jnp.asarray(noise, x.dtype)])])
        slots = jnp.tensordot(self.mix[i], terms, 1, precision=jax.lax.Precision.HIGHEST)
        return SchedulerState(self, slots, i + 1, state.key)


def padded(plan: Any, rows: int, fill: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A plan in tables of `rows` rows, those from `plan.steps` on filled with a column's entry of `fill`, or with 0."""
    extra = rows - len(plan.timesteps)
    if extra < 0:
        raise ValueError(f"A plan of {len(plan.timesteps)} evaluations does not fit a bound of {rows}: raise it.")

    def grow(name: str, a: Array) -> Array:
        if a.ndim == 0:
            return a
        tail = np.broadcast_to(np.asarray(fill.get(name, 0), a.dtype), (extra, *a.shape[1:]))
        return np.concatenate([np.asarray(a), tail])

    return plan._replace(**{name: grow(name, a) for name, a in plan._asdict().items()})


class SchedulerState(NamedTuple):
    """Where a run stands: a pytree that `step` maps to the next one."""

    plan: Plan
    slots: jax.Array  # [SLOTS, B, ...] float32
    index: jax.Array  # [] int32, evaluations made
    key: jax.Array  # [B] one PRNG key an image

    @property
    def sample(self) -> jax.Array:
        """The sample [B, ...] float32; the result once `index` has reached `plan.steps`."""
        return self.slots[0]

    @property
    def model_input(self) -> jax.Array:
        """What the network is to see at this evaluation, [B, ...] float32; cast it to the network's dtype."""
        return self.scaled(self.sample)

    @property
    def timestep(self) -> jax.Array:
        """What the network is to be told at this evaluation, [] float32."""
        return self.plan.timesteps[self.index]

    @property
    def place(self) -> NamedSharding:
        """Where the sample lies, in a state of shapes that say where they lie."""
        slots = self.slots.sharding
        return NamedSharding(slots.mesh, PartitionSpec(*slots.spec[1:]))

    def scaled(self, x: jax.Array) -> jax.Array:
        """A sample as the network is to see it at this evaluation."""
        return self.plan.scale[self.index] * x

    def moved(self, x: jax.Array) -> SchedulerState:
        """The same state with another sample."""
        return self._replace(slots=self.slots.at[0].set(x))


# --- on the host -----------------------------------------------------------------------------------------------------


class Pred(NamedTuple):
    """A prediction at one row, as a solver sees it: x_0 after clipping, eps before it, the network's output."""

    x0: np.ndarray
    eps: np.ndarray
    out: np.ndarray


def tabulate(
    grid: Grid,
    step: Callable,
    predict: Prediction,
    rows: Iterable[int] | None = None,
    *,
    scale: np.ndarray | float = 1.0,
    init_noise_sigma: float = 1.0,
    clip: float = np.inf,
    threshold: tuple[float, float] = (0.0, 0.0),
    variance: np.ndarray | float = 0.0,
) -> Plan:
    """Run a solver's `step` on the unit vectors of (slots, x_0, output, noise) for the given rows of the grid.

    Raises ValueError if a coefficient is not finite, which is a schedule that the solver cannot cross.

    >>> import numpy as np
    >>> from flaxdiff.schedulers import path, solvers, tables
    >>> sigma = np.array([10.0, 1.0, 0.0]); alpha = np.ones(3)
    >>> g = path.chain([999, 500], alpha, sigma)
    >>> predict = path.prediction("epsilon", g.alpha, g.sigma)
    >>> tables.tabulate(g, solvers.ddim(g, 0 * g.sigma), predict).mix.shape
    (2, 5, 8)
    """
    basis = np.eye(SLOTS + 3)
    slots, x0, out, z = basis[:SLOTS], basis[SLOTS], basis[SLOTS + 1], basis[SLOTS + 2]
    rows = list(range(len(grid.t)) if rows is None else rows)
    mix = np.zeros((len(rows), SLOTS, SLOTS + 3))
    for k, i in enumerate(rows):
        p = Pred(x0, predict.eps_sample[i] * slots[0] + predict.eps_output[i] * out, out)
        new = step(i, k, slots, p, z)
        mix[k, : len(new)] = new
    if not np.isfinite(mix).all():
        k = int(np.argmax(~np.isfinite(mix).all((1, 2))))
        raise ValueError(
            f"The solver has no finite step at evaluation {k}, from alpha={grid.alpha[rows[k]]:g}, "
            f"sigma={grid.sigma[rows[k]]:g} to sigma={grid.sigma_to[rows[k]]:g}: choose another spacing or final sigma."
        )

    n = len(grid.t)
    column = lambda a, *shape: np.broadcast_to(np.asarray(a, np.float32), (n, *shape))[rows]
    return Plan(
        timesteps=column(grid.t),
        scale=column(scale),
        alpha=column(grid.alpha),
        sigma=column(grid.sigma),
        x0_sample=column(predict.x0_sample),
        x0_output=column(predict.x0_output),
        clip=column(clip),
        threshold=column(threshold, 2),
        variance=column(variance, 2),
        mix=mix.astype(np.float32),
        noisy=mix[:, :, -1].any(1),
        init_noise_sigma=np.asarray(init_noise_sigma, np.float32),
        steps=np.asarray(len(rows), np.int32),
    )


# --- on the device ---------------------------------------------------------------------------------------------------


def image_keys(key: jax.Array, batch: int, index: Array | None = None) -> jax.Array:
    """One PRNG key an image: [B] keys are taken as they are, a single key is folded with 0 … B - 1, or with `index`.

    The key of image b depends on (key, b) alone, so a picture does not depend on how many were asked for with it, nor,
    if its index goes with it, on the device that it is made on.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch) if index is None else index)
    if key.shape != (batch,):
        raise ValueError(f"Got PRNG keys of shape {key.shape} for {batch} images: pass one key, or one an image.")
    return key


def folded(keys: jax.Array, i: jax.Array | int) -> jax.Array:
    """Keys [B] for another use, each with the same number folded in."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)


def draw(keys: jax.Array, i: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The unit noise of draw i, as a function of the sample [B, ...] that it is for: image b's is its key's alone."""

    def like(x: jax.Array) -> jax.Array:
        one = lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype)
        return jax.vmap(one)(keys)

    return like


def init(plan: Any, latents: jax.Array, key: jax.Array) -> Any:
    """The state before the first evaluation, of the kind that the plan is for.

    Args:
      plan: from a scheduler's `plan`.
      latents: [B, ...] the sample to start from: unit noise times `plan.init_noise_sigma`, or
        `plan.alpha[0] * image + plan.sigma[0] * noise` for a run from an image; or tokens.
      key: one PRNG key, or [B] of them, for the noise that the solver draws.
    """
    return jax.tree.map(jnp.asarray, plan).start(latents, image_keys(key, len(latents)))


def quantile(x: jax.Array, q: jax.Array | float, axes: Sequence[int]) -> jax.Array:
    """`jnp.quantile` of float32 numbers that are not negative, over axes that are kept: found bit by bit, by counting.

    A sort takes more passes over the numbers, and a TPU's compiler seconds.

    >>> float(quantile(jnp.array([3.0, 1.0, 2.0, 0.0]), 0.5, [0])[0])
    1.5
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)  # in the order of the numbers
    last = math.prod(x.shape[axis] for axis in axes) - 1
    place = jnp.float32(q * last)  # of the quantile among the numbers from below, between the k-th and the next
    k = place.astype(jnp.int32)
    count = lambda those: those.sum(axes, keepdims=True)
    least = lambda those: jnp.where(those, x, jnp.inf).min(axes, keepdims=True)

    def add(n: int, found: jax.Array) -> jax.Array:
        more = found | (1 << (30 - n))
        return jnp.where(count(bits < more) <= k, more, found)

    found = jax.lax.fori_loop(0, 31, add, jnp.zeros_like(count(bits > 0)))
    here = least(bits >= found)
    after = jnp.where(count(bits <= found) > jnp.minimum(k + 1, last), here, least(bits > found))
    return here + (place % 1) * (after - here)


def _predictions(state: SchedulerState, model_output: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """x_0, the output without its variance channels, and the factor by which a learned variance stretches the noise."""
    plan, i, x = state.plan, state.index, state.slots[0]
    out = jnp.asarray(model_output, jnp.float32)
    spread = 1.0
    if out.shape == (*x.shape[:-1], 2 * x.shape[-1]):
        out, v = jnp.split(out, 2, -1)
        log_range, direct = plan.variance[i]
        spread = jnp.where(direct > 0, jnp.sqrt(jnp.maximum(v, 0)), jnp.exp(log_range * (v + 1) / 4))
    if out.shape != x.shape:
        raise ValueError(
            f"The network's output has shape {model_output.shape} and the sample {x.shape}: they must agree, or the "
            "output have twice the channels (last axis) when it predicts a variance."
        )
    x0 = plan.x0_sample[i] * x + plan.x0_output[i] * out
    share, largest = plan.threshold[i]

    def dynamic(x0):  # Imagen (2205.11487): a quantile of |x_0| over each image becomes 1
        axes = tuple(range(1, x0.ndim))
        bound = jnp.minimum(jnp.maximum(quantile(jnp.abs(x0), share, axes), 1), largest)
        return jnp.clip(x0, -bound, bound) / bound

    x0 = jax.lax.cond(share > 0, dynamic, lambda x0: jnp.clip(x0, -plan.clip[i], plan.clip[i]), x0)
    return x0, out, spread


@functools.partial(jax.jit, inline=True)
def denoised(state: SchedulerState, model_output: jax.Array) -> jax.Array:
    """The x_0 [B, ...] float32 that a network's output stands for at this evaluation, clipped as the plan asks."""
    return _predictions(state, model_output)[0]


@functools.partial(jax.jit, inline=True)
def step(state: Any, model_output: jax.Array, noise: Any = None) -> Any:
    """Advance by one network evaluation, as the plan of the run says. Pure; jit, vmap and grad apply.

    Args:
      state: from `init` or an earlier step.
      model_output: [B, ...] what the network returned for `state.model_input` and `state.timestep`.
      noise: to use in place of what the keys give; it and the output are as the plan's `advance` wants them.
    """
    return state.plan.advance(state, model_output, noise)


# --- for what is no table --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Where a run stands whose plan is no table: a pytree that `step`, or the scheduler's own, maps to the next one."""

    plan: Any
    sample: jax.Array  # [B, ...] float32, or tokens [B, N] int32
    index: jax.Array  # [] int32, evaluations made
    key: jax.Array  # [B] one PRNG key an image
    given: Any = ()  # what the run needs beside: the image that RePaint completes

    @property
    def model_input(self) -> jax.Array:
        """What the network is to see at this evaluation."""
        return self.scaled(self.sample)

    @property
    def place(self) -> NamedSharding:
        """Where the sample lies, in a state of shapes that say where they lie."""
        return self.sample.sharding

    def scaled(self, x: jax.Array) -> jax.Array:
        """A sample as the network is to see it: as it is."""
        return x

    def moved(self, x: jax.Array) -> Run:
        """The same run with another sample."""
        return self._replace(sample=jnp.asarray(x, self.sample.dtype))

    def knowing(self, image: jax.Array, mask: jax.Array) -> Run:
        """The same run with the image to complete and where (1) it is known."""
        return self._replace(given=(jnp.asarray(image, jnp.float32), jnp.asarray(mask, jnp.float32)))

    @property
    def timestep(self) -> jax.Array:
        """What the network is to be told at this evaluation, []."""
        return self.plan.timesteps[self.index]


def begin(plan: Any, sample: jax.Array, key: jax.Array, given: Any = ()) -> Run:
    """The state before the first evaluation, with one PRNG key or [B] of them."""
    return Run(jax.tree.map(jnp.asarray, plan), sample, jnp.zeros((), jnp.int32), image_keys(key, len(sample)), given)
