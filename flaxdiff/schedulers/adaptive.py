"""DPM-Solver with steps of its own choosing: "DPM adaptive".

Not a table: how many evaluations it takes follows from the network. The loop is one `lax.while_loop` and takes the
network as a function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .sigma import _VarianceExploding
from .tables import Plan


class Solution(NamedTuple):
    """Where `solve` arrived, and what it took."""

    sample: jax.Array  # [B, ...] float32
    evaluations: jax.Array  # [] int32
    accepted: jax.Array  # [] int32, steps kept; the others were redone shorter


@dataclass(frozen=True, kw_only=True)
class DPMSolverAdaptiveScheduler(_VarianceExploding):
    """DPM-Solver of order 3 whose steps keep the difference to order 2 within a tolerance (Lu et al., 2206.00927).

    >>> import jax
    >>> from flaxdiff.schedulers import scheduler
    >>> s = scheduler("DPM adaptive")
    >>> network = lambda x, t: 0.9 * x                        # what a denoiser of small images would do
    >>> noise = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    >>> bool(s.solve(network, noise, rtol=0.01).evaluations > s.solve(network, noise).evaluations)
    True
    """

    accepts: ClassVar[frozenset[str]] = frozenset()
    lacks: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr", "timestep_spacing", "steps_offset"})

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Raises ValueError: the number of evaluations is not known beforehand."""
        raise ValueError(f"{type(self).__name__} chooses its steps as it goes: call solve(network, latents) instead.")

    @functools.partial(jax.jit, static_argnames=("self", "network"))
    def solve(
        self,
        network: Callable[[jax.Array, jax.Array], jax.Array],
        latents: jax.Array,
        *,
        rtol: float | jax.Array = 0.05,
        atol: float | jax.Array = 0.0078,
        h_init: float | jax.Array = 0.05,
        max_steps: int | jax.Array = 1000,
    ) -> Solution:
        """From unit noise to the schedule's least sigma.

        Args:
          network: (model_input [B, ...], timestep []) -> output in the config's prediction type.
          latents: [B, ...] unit noise.
          rtol, atol: error allowed in a step, relative to the sample's values and absolute.
          h_init: first step, in log sigma.
          max_steps: give up, where one has arrived, after so many.
        """
        train = np.asarray(self.train_sigmas())
        log_train, times = jnp.asarray(np.log(train), jnp.float32), jnp.arange(len(train), dtype=jnp.float32)
        end = -jnp.float32(np.log(train[0]))

        def eps(x, s):  # s = -log sigma
            sigma = jnp.exp(-s)
            scale = jax.lax.rsqrt(1 + sigma**2)
            out = jnp.asarray(network(scale * x, jnp.interp(-s, log_train, times)), jnp.float32)
            kinds = {"epsilon": out, "sample": (x - out) / sigma, "v_prediction": scale * (out + sigma * scale * x)}
            return kinds[self.prediction_type]

        def body(carry):
            x, before, s, h, n, accepted = carry
            t = jnp.minimum(end, s + h)
            dt, sigma = t - s, lambda r: jnp.exp(-(s + r * (t - s)))
            # order 3 at thirds of the step, and order 2 from its first two evaluations
            e0 = eps(x, s)
            e1 = eps(x - sigma(1 / 3) * jnp.expm1(dt / 3) * e0, s + dt / 3)
            r = 2 * dt / 3
            x2 = x - sigma(2 / 3) * (jnp.expm1(r) * e0 + 2 * (jnp.expm1(r) / r - 1) * (e1 - e0))
            e2 = eps(x2, s + r)
            low = x - sigma(1.0) * jnp.expm1(dt) * (e0 + 1.5 * (e1 - e0))
            high = x - sigma(1.0) * (jnp.expm1(dt) * e0 + 1.5 * (jnp.expm1(dt) / dt - 1) * (e2 - e0))
            # the error per tolerance sets the next step, softly bounded
            allowed = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(low), jnp.abs(before)))
            error = jnp.sqrt(jnp.mean(((low - high) / allowed) ** 2))
            factor = 1 + jnp.arctan((error + 1e-8) ** (-1 / 3) - 1)
            good = factor >= 0.81
            x, before, s = (jnp.where(good, a, b) for a, b in ((high, x), (low, before), (t, s)))
            return x, before, s, h * factor, n + 1, accepted + good.astype(jnp.int32)

        x = jnp.asarray(latents, jnp.float32) * jnp.float32(train[-1])
        zero = jnp.zeros((), jnp.int32)
        start = (x, x, -log_train[-1], jnp.asarray(h_init, jnp.float32), zero, zero)
        x, _, _, _, n, accepted = jax.lax.while_loop(lambda c: (c[2] < end - 1e-5) & (c[4] < max_steps), body, start)
        return Solution(x, 3 * n, accepted)
