"""Few-step schedulers of distilled networks: predict x_0, add noise again for the next level, repeat.

Each class lists its options, the levels it visits and its solver. Names, options and defaults are diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from . import path, solvers, spacing
from .base import Scheduler
from .discrete import _Variance
from .path import Grid, Prediction


@dataclass(frozen=True, kw_only=True)
class _Distilled(_Variance):
    """Visits a few of the `original_inference_steps` times that a network was distilled at, or of a share of them."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    timestep_scaling: float = 10.0
    swaps: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {"original_inference_steps": None, "origin_share": 1.0}

    def _times(self, n: int, custom: Mapping[str, Any]) -> np.ndarray:
        if "timesteps" in custom:
            return np.asarray(custom["timesteps"]).astype(int)
        origin = self._origin(custom.get("original_inference_steps"))
        origin = origin[: int(len(origin) * custom.get("origin_share", 1.0))]  # image to image: the least noisy ones
        if n > len(origin):
            raise ValueError(
                f"{type(self).__name__}: num_inference_steps={n} exceeds the {len(origin)} times that the network was "
                "distilled at: take fewer, or raise original_inference_steps."
            )
        return origin[::-1][np.floor(np.linspace(0, len(origin), n, endpoint=False)).astype(int)]

    def _origin(self, steps: int | None) -> np.ndarray:
        steps = steps or self.original_inference_steps
        if steps > self.num_train_timesteps:
            raise ValueError(
                f"{type(self).__name__}: original_inference_steps={steps} exceeds num_train_timesteps="
                f"{self.num_train_timesteps}: lower it."
            )
        return np.arange(1, steps + 1) * (self.num_train_timesteps // steps) - 1


@dataclass(frozen=True, kw_only=True)
class LCMScheduler(_Distilled):
    """Latent consistency models: x_0 by a consistency function, noise to the next level (Luo et al., 2310.04378).

    >>> from flaxdiff.schedulers import LCMScheduler
    >>> LCMScheduler().plan(4).timesteps
    array([999., 759., 499., 259.], dtype=float32)
    """

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = self._times(n, custom)
        return self._between(t, np.append(t[1:], -1))

    def solver(self, grid: Grid, n: int, original_inference_steps: int | None, origin_share: float) -> solvers.Step:
        sigma_data, time = 0.5, grid.t * self.timestep_scaling
        skip = sigma_data**2 / (time**2 + sigma_data**2)
        return solvers.consistency(grid, skip, time / np.hypot(time, sigma_data))


@dataclass(frozen=True, kw_only=True)
class TCDScheduler(_Distilled):
    """Strategic stochastic sampling: to time (1 - eta) t_to along the ODE, then noise up to t_to (2402.19159).

    `plan(eta=...)` is the paper's gamma. With `plan(original_inference_steps=...)` every training time may be visited.

    >>> from flaxdiff.schedulers import TCDScheduler
    >>> TCDScheduler().plan(3, eta=0.0).noisy
    array([False, False, False])
    """

    options: ClassVar[Mapping[str, Any]] = {"eta": 0.3, **_Distilled.options}

    def _origin(self, steps: int | None) -> np.ndarray:
        return np.arange(self.num_train_timesteps) if steps else super()._origin(None)

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        t = self._times(n, custom)
        return self._between(t, np.append(t[1:], 0))

    def solver(
        self, grid: Grid, n: int, eta: float, original_inference_steps: int | None, origin_share: float
    ) -> solvers.Step:
        if not 0 <= eta <= 1:
            raise ValueError(f"TCDScheduler: eta={eta} must lie in [0, 1].")
        to = np.append(grid.t[1:], 0).astype(int)
        power = self.alphas_cumprod()
        return solvers.ddim(grid, np.sqrt(1 - power[to] / power[np.floor((1 - eta) * to).astype(int)]))

    def columns(self, grid: Grid) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class CMStochasticIterativeScheduler(Scheduler):
    """Consistency models, in one step or several (Song et al., 2303.01469, algorithm 1).

    >>> from flaxdiff.schedulers import CMStochasticIterativeScheduler
    >>> CMStochasticIterativeScheduler().plan(2).sigma.round(3)
    array([80.  ,  2.24], dtype=float32)
    """

    num_train_timesteps: int = 40
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    s_noise: float = 1.0
    rho: float = 7.0
    clip_denoised: bool = True

    def train_sigmas(self) -> np.ndarray:
        """sigma at each training time, float64 [num_train_timesteps], ascending."""
        return spacing.karras(self.sigma_min, self.sigma_max, self.num_train_timesteps, self.rho)[::-1]

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if n > self.num_train_timesteps:
            raise ValueError(
                f"CMStochasticIterativeScheduler: num_inference_steps={n} exceeds num_train_timesteps="
                f"{self.num_train_timesteps}: take fewer."
            )
        steps = np.arange(n)[::-1] * (self.num_train_timesteps // n)
        t = np.asarray(custom.get("timesteps", steps)).astype(int)
        # times count from the noisy end here
        sigma = self.train_sigmas()[::-1][t[::-1]]
        return path.chain(250 * np.log(sigma), np.ones(n + 1), np.append(sigma, self.sigma_min))

    def prediction(self, grid: Grid) -> Prediction:
        excess, data = grid.sigma - self.sigma_min, self.sigma_data  # the boundary condition: x_0 = x at sigma_min
        skip, out = data**2 / (excess**2 + data**2), excess * data / np.hypot(grid.sigma, data)
        return Prediction(skip, out, (1 - skip) / grid.sigma, -out / grid.sigma)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        std = np.sqrt(np.maximum(grid.sigma_to**2 - self.sigma_min**2, 0))
        return solvers.ddim(grid, grid.sigma_to, self.s_noise * std)

    def columns(self, grid: Grid) -> dict[str, Any]:
        clip = {"clip": 1.0} if self.clip_denoised else {}
        return {**clip, "scale": 1 / np.hypot(grid.sigma, self.sigma_data), "init_noise_sigma": self.sigma_max}

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(self.num_train_timesteps), self.train_sigmas()


@dataclass(frozen=True, kw_only=True)
class ConsistencyDecoderScheduler(Scheduler):
    """The two steps of DALL-E 3's consistency decoder, at times 1008 and 512 of a cosine schedule (2303.01469).

    >>> from flaxdiff.schedulers import ConsistencyDecoderScheduler
    >>> ConsistencyDecoderScheduler().plan(2).timesteps
    array([1008.,  512.], dtype=float32)
    """

    num_train_timesteps: int = 1024
    sigma_data: float = 0.5
    accepts: ClassVar[frozenset[str]] = frozenset()

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        power = path.alphas_cumprod(self.num_train_timesteps, 0.0, 0.0, "squaredcos_cap_v2")
        return np.sqrt(power), np.sqrt(1 - power)

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if n != 2 or self.num_train_timesteps <= 1008:
            raise ValueError(
                f"ConsistencyDecoderScheduler: {n} steps of {self.num_train_timesteps}; the decoder was trained for "
                "exactly 2, of 1024 times."
            )
        alpha, sigma = self.levels()
        t = np.array([1008, 512])
        return path.chain(t, np.append(alpha[t], 1.0), np.append(sigma[t], 0.0))

    def _ratio(self, grid: Grid) -> np.ndarray:
        return np.hypot(grid.sigma / grid.alpha, self.sigma_data)

    def prediction(self, grid: Grid) -> Prediction:
        ratio, data = self._ratio(grid), self.sigma_data
        skip, out = data**2 / (grid.alpha * ratio**2), grid.sigma / grid.alpha * data / ratio
        return Prediction(skip, out, (1 - grid.alpha * skip) / grid.sigma, -grid.alpha * out / grid.sigma)

    def solver(self, grid: Grid, n: int) -> solvers.Step:
        return solvers.ddim(grid, grid.sigma_to)

    def columns(self, grid: Grid) -> dict[str, Any]:
        return {"scale": 1 / (grid.alpha * self._ratio(grid)), "init_noise_sigma": float(grid.sigma[0])}


@dataclass(frozen=True, kw_only=True)
class SCMScheduler(Scheduler):
    """Continuous-time consistency in TrigFlow: x_t = cos t x_0 + sin t sigma_data eps (Lu and Song, 2410.11081).

    Two steps go by `plan(intermediate_timesteps=1.3)`, others are evenly spaced below `plan(max_timesteps=...)`. Custom
    timesteps include the end, 0.

    >>> from flaxdiff.schedulers import SCMScheduler
    >>> SCMScheduler().plan(2).timesteps
    array([1.5708, 1.3   ], dtype=float32)
    """

    prediction_type: str = "trigflow"
    sigma_data: float = 0.5
    ends: ClassVar[frozenset[str]] = frozenset({"timesteps"})
    options: ClassVar[Mapping[str, Any]] = {"max_timesteps": 1.5708, "intermediate_timesteps": 1.3}
    choices: ClassVar[Mapping[str, tuple]] = {"prediction_type": ("trigflow",)}

    def time_limit(self) -> float:
        return 1.5709

    def grid(self, n: int, custom: Mapping[str, Any]) -> Grid:
        if n > self.num_train_timesteps:
            raise ValueError(f"SCMScheduler: num_inference_steps={n} exceeds {self.num_train_timesteps}: take fewer.")
        top = custom.get("max_timesteps", self.options["max_timesteps"])
        middle = custom.get("intermediate_timesteps", self.options["intermediate_timesteps"])
        t = np.array([top, middle, 0.0]) if n == 2 and middle is not None else np.linspace(top, 0, n + 1)
        t = np.asarray(custom.get("timesteps", t), float)
        return path.chain(t[:-1], np.cos(t), np.sin(t) * self.sigma_data)

    def prediction(self, grid: Grid) -> Prediction:
        cos, sin = grid.alpha, grid.sigma / self.sigma_data
        return Prediction(cos, -sin, sin / self.sigma_data, cos / self.sigma_data)

    def solver(self, grid: Grid, n: int, max_timesteps: float, intermediate_timesteps: float | None) -> solvers.Step:
        return solvers.ddim(grid, grid.sigma_to)

    def level(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.clip(jnp.asarray(timesteps, jnp.float32), 0, math.pi / 2)
        return jnp.cos(t), jnp.sin(t) * self.sigma_data
