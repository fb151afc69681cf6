"""How a clean sample becomes what a network is trained on: levels of noise, the target, how much each level counts.

A `Path` is a table with a row for each level, made from a scheduler on the host in float64. Everything that tells
epsilon, v, x_0 and flow prediction apart is a column of it, so a loss that reads the table serves them all. A weight is
a function of the signal-to-noise ratio alone, and is carried over from one kind of prediction to another by what it
says of the error in x_0. Noise is any function (key, shape) -> unit noise.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.schedulers import path as levels
from flaxdiff.schedulers import spacing
from flaxdiff.schedulers.base import Scheduler

Noise = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> noise of that shape, float32
Weight = Callable[
    [np.ndarray, str], np.ndarray
]  # (signal-to-noise ratio, prediction_type) -> weight of the squared error

# --- levels ----------------------------------------------------------------------------------------------------------


class Path(NamedTuple):
    """The levels at which a network is trained, one a row, from the least noise to the most.

    Attributes:
      time: what the network is told [n], int32 where it is a training time, float32 where it is T σ.
      alpha, sigma: x_t = α x_0 + σ ε, float64 [n].
      prediction_type: what the network is to say, a key of `schedulers.path.TARGETS`.
    """

    time: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    prediction_type: str

    @property
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio α² / σ² of each level, float64 [n]."""
        return (self.alpha / self.sigma) ** 2

    def noised(self, row: jax.Array, x0: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x_t = α x_0 + σ ε and the target p x_0 + q ε, at a row for each example [B] of x_0, ε [B, ...]."""
        target = levels.TARGETS[self.prediction_type](self.alpha, self.sigma)
        alpha, sigma, p, q = at(row, x0, self.alpha, self.sigma, *target)
        return alpha * x0 + sigma * noise, p * x0 + q * noise

    def predicted(self, row: jax.Array, x: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The x_0 and ε that a network's output stands for at x_t.

        Raises ValueError where it says nothing of x_0, as of epsilon at zero signal.
        """
        columns = levels.prediction(self.prediction_type, self.alpha, self.sigma)
        x0_x, x0_y, eps_x, eps_y = at(row, x, *columns)
        return x0_x * x + x0_y * output, eps_x * x + eps_y * output


def at(row: jax.Array, like: jax.Array, *columns: np.ndarray) -> list[jax.Array]:
    """Columns [n] of a table at rows [B], float32 [B, 1, ...] of as many axes as `like` has."""
    table = jnp.asarray(np.stack(columns), jnp.float32)[:, row]
    return [a.reshape(-1, *[1] * (like.ndim - 1)) for a in table]


def path_of(scheduler: Scheduler) -> Path:
    """The levels that a scheduler's networks are trained at.

    With betas: α = √ᾱ_t, σ = √(1 - ᾱ_t) at t = 0 … T - 1, whatever scale the scheduler samples in. For a flow:
    α = 1 - σ with σ = (t + 1) / T moved by the scheduler's shift, and the network is told T σ. A shift that depends on
    the size of the picture (`use_dynamic_shifting`) is for sampling alone, as in diffusers' scripts.

    Raises:
      TypeError: the scheduler has neither.

    >>> from flaxdiff.schedulers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
    >>> [path_of(s).prediction_type for s in (DDPMScheduler(), FlowMatchEulerDiscreteScheduler())]
    ['epsilon', 'flow_prediction']
    >>> path_of(FlowMatchEulerDiscreteScheduler(shift=3.0)).time[[0, 499, 999]].round()
    array([   3.,  750., 1000.], dtype=float32)

    Reference: Ho et al., 2020; Esser et al., Scaling Rectified Flow Transformers, 2024.
    """
    T, flows = scheduler.num_train_timesteps, getattr(scheduler, "use_flow_sigmas", False)
    shift = scheduler.flow_shift if flows else getattr(scheduler, "shift", None)
    if shift is not None:
        shift = 1.0 if getattr(scheduler, "use_dynamic_shifting", False) else shift
        sigma = spacing.shifted(np.arange(1, T + 1) / T, shift)
        kind = getattr(scheduler, "prediction_type", "flow_prediction")
        return Path((T * sigma).astype(np.float32), 1 - sigma, sigma, kind)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(f"{type(scheduler).__name__} has neither betas nor a flow to train on; use a DDPMScheduler.")
    power = scheduler.alphas_cumprod()
    return Path(np.arange(T, dtype=np.int32), np.sqrt(power), np.sqrt(1 - power), scheduler.prediction_type)


# --- what each level counts ------------------------------------------------------------------------------------------

# By how much an error of the output, squared, exceeds the one that it makes in x_0, as a function of α² / σ².
EXCESS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "epsilon": lambda snr: snr,
    "sample": lambda snr: np.ones_like(snr),
    "v_prediction": lambda snr: 1 + snr,
    "flow_prediction": lambda snr: (1 + np.sqrt(snr)) ** 2,
}


def stated(kind: str, formula: Callable[[np.ndarray], np.ndarray]) -> Weight:
    """The weight that is formula(snr) of the squared error of one kind of prediction, for every kind.

    What changes with the kind is the error that is weighed, so that one in x_0 counts the same whatever the network
    says: w(kind') = formula · EXCESS[kind] / EXCESS[kind'].

    >>> cosine = stated("sample", lambda snr: 1 + 0 * snr)
    >>> cosine(np.array([3.0]), "v_prediction")
    array([0.25])
    """

    def weight(snr: np.ndarray, prediction_type: str) -> np.ndarray:
        snr = np.maximum(np.asarray(snr, np.float64), np.finfo(np.float64).tiny)  # at zero signal, the limit
        return formula(snr) * (EXCESS[kind](snr) / EXCESS[prediction_type](snr))

    return weight


def min_snr(snr_gamma: float = 5.0) -> Weight:
    """min(SNR, γ) of the squared error in x_0 (Hang et al., Efficient Diffusion Training via Min-SNR, 2023)."""
    return stated("sample", lambda snr: np.minimum(snr, snr_gamma))


def soft_min_snr(snr_gamma: float = 5.0) -> Weight:
    """SNR γ / (SNR + γ) of the squared error in x_0 (Crowson et al., Hourglass Diffusion Transformers, 2024)."""
    return stated("sample", lambda snr: snr * snr_gamma / (snr + snr_gamma))


def p2(p2_gamma: float = 1.0, p2_k: float = 1.0) -> Weight:
    """1 / (k + SNR)^γ of the squared error in ε (Choi et al., Perception Prioritized Training, 2022)."""
    return stated("epsilon", lambda snr: (p2_k + snr) ** -p2_gamma)


def debiased() -> Weight:
    """1 / √SNR of the squared error in ε (Yu et al., Debias the Training of Diffusion Models, 2023)."""
    return stated("epsilon", lambda snr: snr**-0.5)


def original() -> Weight:
    """1 of the squared error in x_0, whatever is predicted: `--precondition_outputs` of the script for SD3."""
    return stated("sample", np.ones_like)


def sd3(weighting_scheme: str = "none") -> Weight:
    """The weights of rectified flows, of the squared error in ε - x_0; `none` is 1, as are schemes that draw times.

    "sigma_sqrt": σ⁻². "cosmap": 2 / (π (1 - 2σ + 2σ²)).

    Reference: Esser et al., Scaling Rectified Flow Transformers, 2024, section 3.1.
    """
    schemes = {
        "sigma_sqrt": lambda sigma: sigma**-2,
        "cosmap": lambda sigma: 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2)),
        **dict.fromkeys(("none", "logit_normal", "mode"), np.ones_like),
    }
    if weighting_scheme not in schemes:
        raise ValueError(f"weighting_scheme={weighting_scheme!r} is not known; use one of {sorted(schemes)}.")
    return stated("flow_prediction", lambda snr: schemes[weighting_scheme](1 / (1 + np.sqrt(snr))))


def weights_of(path: Path, weight: Weight | None) -> np.ndarray:
    """What each level counts, float64 [n]; 1 without a weight.

    Raises:
      ValueError: a level would count infinitely or less than nothing.
    """
    if weight is None:
        return np.ones(len(path.time))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        values = weight(path.snr, path.prediction_type)
        bad = ~(np.isfinite(values.astype(np.float32)) & (values >= 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"The weight of level {row}, of signal-to-noise ratio {path.snr[row]:g}, is {values[row]:g} for "
            f"prediction_type={path.prediction_type!r}; with rescale_betas_zero_snr predict v, or take min_snr."
        )
    return values


# --- noise -----------------------------------------------------------------------------------------------------------


def offset(noise_offset: float, noise: Noise = jax.random.normal) -> Noise:
    """Noise, and so much more that is the same at all places of a channel: ε + strength · N(0, 1) [B, 1, …, 1, C].

    A network learns by it to make pictures that are dark or light as a whole; 0.05 to 0.1.

    >>> offset(0.1)(jax.random.key(0), (2, 8, 8, 4)).shape
    (2, 8, 8, 4)

    Reference: Guttenberg, Diffusion with Offset Noise, 2023.
    """

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        whole = (shape[0], *[1] * (len(shape) - 2), shape[-1])
        return noise(key, shape) + noise_offset * jax.random.normal(jax.random.fold_in(key, 1), whole)

    return draw


def pyramid(discount: float = 0.8) -> Noise:
    """Noise at every halving i of the picture, drawn large, times discount^i, and all of it to unit variance.

    >>> float(pyramid()(jax.random.key(0), (4, 16, 16, 4)).std().round(3))
    1.0

    Reference: Whitaker, Multi-Resolution Noise for Diffusion Model Training, 2023.
    """

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        b, *sides, channels = shape
        total, small, i = jax.random.normal(key, shape), sides, 0
        while min(small) > 1:
            small, i = [side // 2 for side in small], i + 1
            coarse = jax.random.normal(jax.random.fold_in(key, i), (b, *small, channels))
            total += discount**i * jax.image.resize(coarse, shape, "linear")
        return total / total.std()

    return draw
