"""What is minimised: the denoising loss of diffusion, and what a difference between pictures costs.

Each function here returns a loss in the sense of `state.Loss`. The denoising loss is told how to call the network, so
one function serves every family, and adapters, which only change what `predict` does. What tells kinds of prediction,
weights, noise and draws of the time apart are values that it is given: see `noising` and `timesteps`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxdiff.core import Spec, apply
from flaxdiff.training import timesteps as times
from flaxdiff.training.noising import Noise, Path, Weight, at, weights_of
from flaxdiff.training.state import Loss

Batch = Mapping[str, Any]
Predict = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]  # (params, x_t [B, ...], t [B], batch) -> prediction


def denoising(
    predict: Predict,
    path: Path,
    *,
    timesteps: times.Timesteps | None = None,
    weight: Weight | None = None,
    noise: Noise = jax.random.normal,
    input_perturbation: float = 0.0,
    dream_detail_preservation: float | None = None,
    prior_loss_weight: float | None = None,
) -> Loss:
    """E w(t) ‖F(x_t, t) - target‖² over t and ε, with x_t = α x_0 + σ ε and the target p x_0 + q ε of the path.

    Args:
      predict: `(params, x_t, t, batch) -> prediction`, the shape of x_t.
      path: from `noising.path_of(scheduler)`.
      timesteps: from `timesteps.sampler`; by default uniform, stratified over the batch.
      weight: what each level counts, e.g. `noising.min_snr(5.0)`; by default 1.
      noise: of ε, e.g. `noising.offset(0.1)`.
      input_perturbation: further noise in x_t alone, in parts of σ; 0.1.
      dream_detail_preservation: p of DREAM, which asks the network twice: the second time about x_t and the target with
        ε + σ^p (ε - ε̂), what it said the first time being ε̂; 1.
      prior_loss_weight: the second half of a batch counts so much beside the first: DreamBooth's class pictures.

    The batch is a dictionary whose "latents" [B, ...] are x_0, and whose "mask" [B, ..., 1], if there is one, says how
    much each place counts; the rest is for `predict`. `loss_low` and `loss_high` among the metrics are the means,
    without weights, over the less and the more noisy half of the schedule.

    >>> from flaxdiff.schedulers import DDPMScheduler
    >>> from flaxdiff.training.noising import path_of
    >>> loss = denoising(lambda params, x, t, batch: 0 * x, path_of(DDPMScheduler()))
    >>> float(loss({}, {"latents": jnp.zeros((64, 8, 8, 4))}, jax.random.key(0))[0].round(1))
    1.0

    Reference: Ho et al., Denoising Diffusion Probabilistic Models, 2020; Salimans and Ho, 2022 (v); Esser et al., 2024
    (flow); Ning et al., Input Perturbation Reduces Exposure Bias in Diffusion Models, 2023; Zhou et al., DREAM, 2023;
    Ruiz et al., DreamBooth, 2023 (prior).
    """
    counts, rows = weights_of(path, weight), len(path.time)
    draw = timesteps or times.sampler()

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        k_time, k_noise = jax.random.split(key)
        x0 = batch["latents"].astype(jnp.float32)
        row, eps = draw(k_time, len(x0), rows), noise(k_noise, x0.shape)
        x, target = path.noised(row, x0, eps)
        ask = lambda x: predict(params, x, jnp.asarray(path.time)[row], batch).astype(jnp.float32)
        if input_perturbation:
            more = input_perturbation * jax.random.normal(jax.random.fold_in(k_noise, 2), x0.shape)
            x, _ = path.noised(row, x0, eps + more)
        if dream_detail_preservation is not None:
            (sigma,) = at(row, x0, path.sigma)
            apart = eps - path.predicted(row, x, ask(x))[1]
            apart = jax.lax.stop_gradient(sigma**dream_detail_preservation * apart)
            x, (_, target) = x + sigma * apart, path.noised(row, x0, eps + apart)
        prediction = ask(x)
        error = squared(prediction - target, batch.get("mask"))

        value = of_halves(jnp.asarray(counts, jnp.float32)[row] * error, prior_loss_weight)
        of = lambda some: jnp.sum(error, where=some) / jnp.maximum(jnp.sum(some, dtype=jnp.float32), 1)
        low = row < rows // 2
        return value, {"loss_low": of(low), "loss_high": of(~low)}

    return loss


def squared(error: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean square [B] of each example's error [B, ...], of the places that a mask [B, ..., 1] counts if given."""
    axes = tuple(range(1, error.ndim))
    if mask is None:
        return jnp.square(error).mean(axes)
    mask = jnp.broadcast_to(mask.astype(error.dtype), error.shape)
    return (mask * jnp.square(error)).sum(axes) / jnp.maximum(mask.sum(axes), 1e-6)


def of_halves(each: jax.Array, prior_loss_weight: float | None) -> jax.Array:
    """The mean of losses [B]; or that of the first half and so much of that of the second."""
    if prior_loss_weight is None:
        return each.mean()
    if len(each) % 2:
        raise ValueError(f"A batch of {len(each)} has no halves: with prior_loss_weight give pairs, instances first.")
    own, prior = jnp.split(each, 2)
    return own.mean() + prior_loss_weight * prior.mean()


# --- conditions left out ---------------------------------------------------------------------------------------------


class Drop(NamedTuple):
    """What stands for no condition, and for which u in [0, 1) of an example it does: low <= u < high."""

    empty: Any  # an array, or a tree of them as the condition is, of one example
    low: float
    high: float


def dropped(batch: Batch, key: jax.Array, drops: Mapping[str, Drop]) -> dict[str, Any]:
    """A batch with some conditions of some examples left out, by one u for each example.

    >>> batch = {"text": jnp.ones((1000, 2)), "latents": jnp.ones((1000, 3))}
    >>> left = dropped(batch, jax.random.key(0), {"text": Drop(jnp.zeros(2), 0.0, 0.1)})
    >>> bool(850 < left["text"][:, 0].sum() < 950), bool((left["text"][:, 0] == left["text"][:, 1]).all())
    (True, True)
    """
    u = jax.random.uniform(key, (len(jax.tree.leaves([batch[name] for name in drops])[0]),))

    def either(drop: Drop) -> Callable[[jax.Array, jax.Array], jax.Array]:
        out = (drop.low <= u) & (u < drop.high)
        return lambda given, empty: jnp.where(out.reshape(-1, *[1] * (given.ndim - 1)), empty, given)

    return {**batch, **{name: jax.tree.map(either(drop), batch[name], drop.empty) for name, drop in drops.items()}}


def dropping(loss: Loss, drops: Mapping[str, Drop]) -> Loss:
    """A loss whose batches lose conditions, for classifier-free guidance (Ho and Salimans, 2022)."""
    return lambda params, batch, key: loss(params, dropped(batch, jax.random.fold_in(key, 3), drops), key)


def three_ways(p: float, text: Any, picture: Any) -> tuple[Drop, Drop]:
    """The drops of a text and of a picture that leave out the text, the picture or both, each with probability p.

    Reference: Brooks et al., InstructPix2Pix, 2023, section 3.2.1.
    """
    if not 0 <= p <= 1 / 3:
        raise ValueError(f"conditioning_dropout_prob={p} must lie in [0, 1/3]: three ways to leave something out.")
    return Drop(text, 0.0, 2 * p), Drop(picture, p, 3 * p)


# --- autoencoders ----------------------------------------------------------------------------------------------------


def pictures(error: jax.Array, *, edges: float = 0.25, squares: float = 2.0) -> tuple[jax.Array, jax.Array]:
    """L1 + `squares` L2 + `edges` L1 of the gradients of an error [B, H, W, C], and the mean PSNR in dB."""
    gradients = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    mse = jnp.square(error).mean((1, 2, 3))
    value = jnp.abs(error).mean() + squares * mse.mean() + edges * gradients
    return value, jnp.mean(10 * jnp.log10(4 / mse))


def decoding(spec: Spec, *, squares: float = 10.0, noise: float = 0.0) -> Loss:
    """`pictures` of what the decoder alone makes of given latents, to which Gaussian noise is added.

    The batch holds "latents" [B, h, w, c] and "image" [B, H, W, C] in [-1, 1].
    """

    def loss(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        latents = batch["latents"] + noise * jax.random.normal(key, batch["latents"].shape)
        value, psnr = pictures(apply(spec, params, latents, method="decode") - batch["image"], squares=squares)
        return value, {"psnr": psnr}

    return loss
