"""What is minimised: the denoising loss of diffusion, and the reconstruction loss of an autoencoder.

Each function here returns a loss in the sense of `state.Loss`. The denoising loss is told how to call the network, so
one function serves every family, and adapters, which only change what `predict` does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.core import Spec, apply
from flaxdiff.training.state import Loss

# The network's target as (coefficient of x_0, coefficient of ε), where x_t = α x_0 + σ ε.
TARGETS: dict[str, Callable[[jax.Array, jax.Array], tuple[jax.Array | float, jax.Array | float]]] = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
}


def denoising(
    predict: Callable[[Any, jax.Array, jax.Array, Any], jax.Array],
    alphas_cumprod: np.ndarray,
    prediction_type: str = "epsilon",
    noise_offset: float = 0.0,
) -> Loss:
    """E ‖F(x_t, t) - target‖² over t and ε, with x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.

    Times are stratified over the batch, which lowers the variance of the gradient.

    Args:
      predict: `(params, x_t, t, batch) -> prediction`, the shape of x_t.
      alphas_cumprod: ᾱ [T], of the scheduler.
      prediction_type: "epsilon", "sample" or "v_prediction".
      noise_offset: adds so much noise that is the same at all places of a channel, so that a network learns to make
        pictures that are dark or light as a whole; 0.05 to 0.1.

    The batch is a dictionary whose "latents" [B, ...] are x_0; the rest is for `predict`. `loss_low` and `loss_high`
    among the metrics are the means over the less and the more noisy half of the schedule.

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020; Salimans and Ho, 2022 (v); Guttenberg,
    Diffusion with Offset Noise, 2023.
    """
    if prediction_type not in TARGETS:
        raise ValueError(f"prediction_type={prediction_type!r} is not known; use one of {sorted(TARGETS)}.")
    steps = len(alphas_cumprod)
    table = jnp.asarray(np.sqrt(np.stack([alphas_cumprod, 1 - np.asarray(alphas_cumprod, np.float64)])), jnp.float32)

    def loss(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        k_time, k_noise = jax.random.split(key)
        x0 = batch["latents"].astype(jnp.float32)
        u = (jnp.arange(x0.shape[0], dtype=jnp.float32) + jax.random.uniform(k_time, x0.shape[:1])) / x0.shape[0]
        t = jnp.minimum(steps * u, steps - 1).astype(jnp.int32)
        alpha, sigma = (a.reshape(-1, *[1] * (x0.ndim - 1)) for a in table[:, t])

        noise = jax.random.normal(k_noise, x0.shape)
        if noise_offset:
            whole = (len(x0), *[1] * (x0.ndim - 2), x0.shape[-1])
            noise += noise_offset * jax.random.normal(jax.random.fold_in(k_noise, 1), whole)
        p, q = TARGETS[prediction_type](alpha, sigma)
        prediction = predict(params, alpha * x0 + sigma * noise, t, batch).astype(jnp.float32)
        error = jnp.mean(jnp.square(prediction - (p * x0 + q * noise)), range(1, x0.ndim))

        of = lambda mask: jnp.sum(error, where=mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)
        low = t < steps // 2
        return error.mean(), {"loss_low": of(low), "loss_high": of(~low)}

    return loss


def pictures(error: jax.Array, *, edges: float = 0.25, squares: float = 2.0) -> tuple[jax.Array, jax.Array]:
    """L1 + `squares` L2 + `edges` L1 of the gradients of an error [B, H, W, C], and the mean PSNR in dB."""
    gradients = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    mse = jnp.square(error).mean((1, 2, 3))
    value = jnp.abs(error).mean() + squares * mse.mean() + edges * gradients
    return value, jnp.mean(10 * jnp.log10(4 / mse))


def reconstruction(spec: Spec, *, kl: float = 1e-4) -> Loss:
    """`pictures` of what an AutoencoderKL makes of its own sample, + `kl` times the KL divergence per latent component.

    The batch holds "image" [B, H, W, C] in [-1, 1].
    """

    def loss(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        posterior = apply(spec, params, batch["image"], method="encode")
        value, psnr = pictures(apply(spec, params, posterior.sample(key), method="decode") - batch["image"])
        divergence = posterior.kl().mean() / math.prod(posterior.mean.shape[1:])
        return value + kl * divergence, {"psnr": psnr, "kl": divergence}

    return loss


def decoding(spec: Spec, *, squares: float = 10.0, noise: float = 0.0) -> Loss:
    """`pictures` of what the decoder alone makes of given latents, to which Gaussian noise is added.

    The batch holds "latents" [B, h, w, c] and "image" [B, H, W, C] in [-1, 1].
    """

    def loss(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        latents = batch["latents"] + noise * jax.random.normal(key, batch["latents"].shape)
        value, psnr = pictures(apply(spec, params, latents, method="decode") - batch["image"], squares=squares)
        return value, {"psnr": psnr}

    return loss
