"""Which levels of noise a batch is trained at.

A density is the inverse of a distribution function: it takes u, uniform in [0, 1), to a share of the schedule, 0 being
the least noise and 1 the most. `sampler` draws the u of a batch and makes rows of a `noising.Path` of them, so that
strata and bounds go with every density.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Density = Callable[[jax.Array], jax.Array]  # u [B] -> share of the schedule [B] in [0, 1]
Timesteps = Callable[[jax.Array, int, int], jax.Array]  # (key, batch, rows of the path) -> row of each, int32 [batch]


def uniform(u: jax.Array) -> jax.Array:
    """Every level as often as any other."""
    return u


def logit_normal(logit_mean: float = 0.0, logit_std: float = 1.0) -> Density:
    """sigmoid(-N(m, s²)): the middle of the schedule most often, and with m > 0 less noise, as in diffusers' scripts.

    >>> (100 * logit_normal()(jnp.array([0.1, 0.5, 0.9]))).round()
    Array([22., 50., 78.], dtype=float32)

    Reference: Esser et al., Scaling Rectified Flow Transformers, 2024, section 3.1.
    """
    return lambda u: jax.nn.sigmoid(logit_std * jax.scipy.stats.norm.ppf(u) - logit_mean)


def mode(mode_scale: float = 1.29) -> Density:
    """u + s (cos²(πu/2) - 1 + u): for s > 0 the middle more often, for s < 0 the ends (2024, as above)."""
    return lambda u: u + mode_scale * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u)


def cosmap(u: jax.Array) -> jax.Array:
    """1 - 1 / (1 + tan(πu/2)), under which log SNR is distributed as on a cosine schedule (2024, as above).

    Instead one may draw uniformly and weigh, as diffusers' scripts do: `noising.sd3("cosmap")`.
    """
    return 1 - 1 / (1 + jnp.tan(jnp.pi * u / 2))


def cubic(u: jax.Array) -> jax.Array:
    """1 - u³: much noise most often, for what decides the layout, as a T2I-Adapter does (Mou et al., 2023, 3.4)."""
    return 1 - u**3


def weighted(weights: np.ndarray) -> Density:
    """Each of n equal parts of the schedule as often as its weight says.

    Args:
      weights: [n], not negative, from the least noise to the most.

    >>> weighted(np.array([0.0, 1.0]))(jnp.array([0.0, 0.5]))
    Array([0.5 , 0.75], dtype=float32)
    """
    weights = np.asarray(weights, np.float64)
    if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError("Weights of timesteps must be finite, not negative and not all zero.")
    (parts,) = np.nonzero(weights)
    until = np.cumsum(weights[parts]) / weights.sum()
    since = np.concatenate([[0.0], until[:-1]])

    def share(u: jax.Array) -> jax.Array:
        i = jnp.searchsorted(jnp.asarray(until[:-1], jnp.float32), u, side="right")
        start, part, chance = (jnp.asarray(a, jnp.float32)[i] for a in (since, parts, until - since))
        return (part + jnp.clip((u - start) / chance, 0, 1 - 1e-6)) / len(weights)

    return share


def timestep_bias(
    strategy: str, *, multiplier: float = 1.0, begin: int = 0, end: int = 1000, portion: float = 0.25, rows: int = 1000
) -> np.ndarray:
    """Weights [rows] for `weighted` that favour some of the schedule: SDXL's `--timestep_bias_…`.

    Args:
      strategy: "later" (the most noisy `portion`), "earlier" (the least), "range" (begin … end) or "none".
      multiplier: how much more often; below 1, less often.
      begin, end: of "range", in training times.
      portion: of "later" and "earlier".
      rows: training times in all.

    Raises:
      ValueError: another strategy, a multiplier or a portion out of bounds, or a range that is none.

    >>> timestep_bias("later", multiplier=3.0, portion=0.5, rows=4)
    array([1., 1., 3., 3.])
    """
    if multiplier <= 0 or not 0 <= portion <= 1:
        raise ValueError(f"multiplier={multiplier} must be positive and portion={portion} within [0, 1].")
    if strategy == "range" and not 0 <= begin < end <= rows:
        raise ValueError(f"begin={begin} and end={end} must be a range within the {rows} training times.")
    some = int(portion * rows)
    ranges = {"later": (rows - some, rows), "earlier": (0, some), "range": (begin, end), "none": (0, 0)}
    if strategy not in ranges:
        raise ValueError(f"timestep_bias_strategy={strategy!r} is not known; use one of {sorted(ranges)}.")
    weights = np.ones(rows)
    weights[slice(*ranges[strategy])] *= multiplier
    return weights


def sampler(
    density: Density = uniform, *, stratified: bool = True, min_timestep: int = 0, max_timestep: int | None = None
) -> Timesteps:
    """How the levels of a batch are drawn.

    Args:
      density: where in the schedule.
      stratified: one u in each of B equal parts of [0, 1), in any order, which lowers the variance of the gradient;
        else each on its own.
      min_timestep, max_timestep: the rows of the path to keep to, the second excluded; by default all.

    >>> sampler()(jax.random.key(0), 4, 1000).sort() // 250
    Array([0, 1, 2, 3], dtype=int32)
    """

    def draw(key: jax.Array, batch: int, rows: int) -> jax.Array:
        high = rows if max_timestep is None else max_timestep
        if not 0 <= min_timestep < high <= rows:
            raise ValueError(f"min_timestep={min_timestep}, max_timestep={high} are no range within {rows} levels.")
        u = jax.random.uniform(key, (batch,))
        if stratified:  # in any order, so that the parts of a batch see the whole schedule
            u = (jax.random.permutation(jax.random.fold_in(key, 1), batch).astype(jnp.float32) + u) / batch
        share = density(u) * (high - min_timestep)
        return min_timestep + jnp.clip(share.astype(jnp.int32), 0, high - min_timestep - 1)

    return draw
