"""Students that need few steps: latent consistency, consistency training, matched distributions, an adversary.

All are losses in the sense of `state.Loss`. A network, student or teacher, is what the denoising loss calls `predict`,
(params, x_t, t, batch) -> output. Where the student is a LoRA its teacher is the same network without, `adapterless`;
where it is a whole network the teacher's weights are another component of the parameters, `instead`. What follows a
student slowly is its `average`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from flaxdiff.adapters.lora import unload_lora
from flaxdiff.nn.embeddings import sinusoids
from flaxdiff.schedulers.consistency import CMStochasticIterativeScheduler
from flaxdiff.schedulers.path import Grid
from flaxdiff.training import timesteps as times
from flaxdiff.training.adversarial import Critic
from flaxdiff.training.losses import Batch, Predict, denoising
from flaxdiff.training.noising import Noise, Path, at
from flaxdiff.training.state import Loss

Generate = Callable[[Any, Batch, jax.Array], jax.Array]  # (params, batch, key) -> x_0 [B, ...]

# --- teachers --------------------------------------------------------------------------------------------------------


def adapterless(predict: Predict) -> Predict:
    """The network without the LoRA that is on it, which no gradient reaches."""
    return lambda params, *args: predict(jax.lax.stop_gradient(unload_lora(params)), *args)


def instead(predict: Predict, **components: str) -> Predict:
    """The network with other parameters: with `unet="teacher"`, `params["teacher"]` is taken for the U-Net's."""
    return lambda params, *args: predict({**params, **{k: params[other] for k, other in components.items()}}, *args)


def average(predict: Predict) -> Predict:
    """The network by the moving average of what moves, where a step gives that, see `train_step`; or as it is."""
    return lambda params, *args: predict(params.get("averaged", params), *args)


def emptied(batch: Batch, empty: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose conditions are left out; `empty` holds what stands for none, by key, of one example.

    Of a dictionary in the batch those entries are left out that the one in `empty` has; what it alone has is added.
    """

    def fill(given: Any, empty: Any) -> Any:
        if isinstance(empty, Mapping):
            return {**given, **{name: fill(given.get(name, value), value) for name, value in empty.items()}}
        return jax.tree.map(lambda a, none: jnp.broadcast_to(none, a.shape).astype(a.dtype), given, empty)

    return fill(batch, empty)


def guided(predict: Predict, empty: Mapping[str, Any], guidance_scale: float) -> Predict:
    """F(∅) + s (F(c) - F(∅)) with the guidance scale s; `empty` as of `emptied`."""

    def ask(params: Any, x: jax.Array, t: jax.Array, batch: Batch) -> jax.Array:
        without = predict(params, x, t, emptied(batch, empty))
        return without + guidance_scale * (predict(params, x, t, batch) - without)

    return ask


# --- consistency -----------------------------------------------------------------------------------------------------


def pseudo_huber(error: jax.Array, huber_c: float) -> jax.Array:
    """√(e² + c²) - c, elementwise."""
    return jnp.sqrt(jnp.square(error) + huber_c**2) - huber_c


def latent_consistency(
    predict: Predict,
    teacher: Predict,
    path: Path,
    empty: Mapping[str, Any],
    *,
    target: Predict | None = None,
    num_ddim_timesteps: int = 50,
    w_min: float = 5.0,
    w_max: float = 15.0,
    loss_type: str = "l2",
    huber_c: float = 0.001,
    timestep_scaling_factor: float = 10.0,
    time_cond_proj_dim: int | None = None,
    whole: bool = False,
    timesteps: times.Timesteps | None = None,
    noise: Noise = jax.random.normal,
) -> Loss:
    """d(f(x_s), sg f(x̂_t)): the student says of x_s what it says one DDIM step of its guided teacher further down.

    f(x, t) = c_skip x + c_out x̂_0(x, t), with c_skip = σ_d² / (τ² + σ_d²), c_out = τ / √(τ² + σ_d²), τ = 10 t, σ_d = ½.
    The teacher's x_0 and ε are those of F(c) + w (F(c) - F(∅)), w uniform in [w_min, w_max] for each example.

    Args:
      predict: the student.
      teacher: the teacher, e.g. `adapterless(predict)`.
      path: of the teacher's scheduler.
      empty: what stands for no condition, by key of the batch.
      target: the network that speaks at x̂_t, e.g. `average(predict)`; by default the student itself.
      num_ddim_timesteps: how many times the student is to know; a step skips all between.
      loss_type: "l2", or "huber" with `huber_c`.
      timestep_scaling_factor: τ / t.
      time_cond_proj_dim: the width at which the student is told w, as `batch["timestep_cond"]`; by default it is not.
      whole: from the noisiest level, with x̂_0 of all the teacher's steps: what the student is to come to, of which the
        loss says little, since it is relative to what the student says itself. For validation.
      timesteps, noise: as of `denoising`; rows are of the `num_ddim_timesteps`.

    The batch's "latents" are x_0.

    Raises:
      ValueError: another loss, or more DDIM steps than training times.

    Reference: Luo et al., Latent Consistency Models, 2023; LCM-LoRA, 2023.
    """
    distances = {"l2": jnp.square, "huber": lambda error: pseudo_huber(error, huber_c)}
    T, n = len(path.time), num_ddim_timesteps
    if loss_type not in distances or not 1 <= n <= T:
        raise ValueError(f"loss_type={loss_type!r} must be one of {sorted(distances)}, num_ddim_timesteps={n} ≤ {T}.")
    visited = np.arange(1, n + 1) * (T // n) - 1
    rows, ends = jnp.asarray(visited), jnp.asarray(np.maximum(visited - T // n, 0))
    time, tau = jnp.asarray(path.time), timestep_scaling_factor * path.time.astype(np.float64)
    skip, out = 0.25 / (tau**2 + 0.25), tau / np.hypot(tau, 0.5)

    def consistent(ask: Predict, params: Any, x: jax.Array, row: jax.Array, batch: Batch) -> jax.Array:
        x0, _ = path.predicted(row, x, ask(params, x, time[row], batch).astype(jnp.float32))
        c_skip, c_out = at(row, x, skip, out)
        return c_skip * x + c_out * x0

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        k_time, k_noise, k_w = jax.random.split(key, 3)
        x0 = batch["latents"].astype(jnp.float32)
        i = jnp.full(len(x0), n - 1) if whole else (timesteps or times.sampler())(k_time, len(x0), n)
        x_s, _ = path.noised(rows[i], x0, noise(k_noise, x0.shape))
        w = jax.random.uniform(k_w, x0.shape[:1], minval=w_min, maxval=w_max)
        told = dict(batch)
        if time_cond_proj_dim is not None:
            told["timestep_cond"] = sinusoids(1000 * w, time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1)

        def below(i: jax.Array, x_s: jax.Array) -> jax.Array:
            """One step of the guided teacher, from s down to t."""
            s, strength = rows[i], w.reshape(-1, *[1] * (x0.ndim - 1))
            asked = lambda batch: path.predicted(s, x_s, teacher(params, x_s, time[s], batch).astype(jnp.float32))
            pred_x0, pred_eps = (c + strength * (c - u) for c, u in zip(asked(batch), asked(emptied(batch, empty))))
            alpha, sigma = at(ends[i], x0, path.alpha, path.sigma)
            return jax.lax.stop_gradient(alpha * pred_x0 + sigma * pred_eps)

        x_t = jax.lax.fori_loop(0, n, lambda j, x: below(i - j, x), x_s) if whole else below(i, x_s)
        end = jnp.zeros_like(i) if whole else ends[i]
        goal = jax.lax.stop_gradient(consistent(target or predict, params, x_t, end, told))
        return distances[loss_type](consistent(predict, params, x_s, rows[i], told) - goal).mean(), {}

    return loss


def discretization(step: int, max_train_steps: int, s_0: int = 10, s_1: int = 1280) -> int:
    """N(k) = min(s_0 2^⌊k / K'⌋, s_1) + 1, K' = ⌊K / (log₂⌊s_1 / s_0⌋ + 1)⌋: how many levels consistency training has.

    It doubles some times in a run: make the loss anew when it does.

    >>> [discretization(step, 1000) for step in (0, 500, 999)]
    [11, 161, 1281]

    Reference: Song and Dhariwal, Improved Techniques for Training Consistency Models, 2023, section 3.4.
    """
    each = int(max_train_steps // (np.log2(s_1 // s_0) + 1))
    return min(s_0 * 2 ** (step // each), s_1) + 1


def lognormal(sigma: np.ndarray, p_mean: float = -1.1, p_std: float = 2.0) -> np.ndarray:
    """The mass [n - 1] of log σ ~ N(p_mean, p_std²) between neighbours of σ [n] (2023, as above, equation 10)."""
    below = erf((np.log(sigma) - p_mean) / (np.sqrt(2) * p_std))
    return np.diff(below)


def consistency(
    predict: Predict,
    scheduler: CMStochasticIterativeScheduler,
    *,
    huber_c: float | None = None,
    timesteps: times.Timesteps | None = None,
    noise: Noise = jax.random.normal,
) -> Loss:
    """λ(σ_i) d(f(x_0 + σ_{i+1} ε), sg f(x_0 + σ_i ε)) with λ = 1 / (σ_{i+1} - σ_i): consistency without a teacher.

    f(x, σ) = c_skip x + c_out F(c_in x, 250 log σ) is the scheduler's, and f(x, σ_min) = x; d is pseudo-Huber.

    Args:
      predict: the network F.
      scheduler: its `num_train_timesteps` are N, see `discretization`.
      huber_c: c of d; by default 0.00054 √dimensions of x_0.
      timesteps: which i; by default so that log σ is nearly N(-1.1, 2²).
      noise: of ε.

    The batch's "latents" are x_0, pictures or latents.

    Reference: Song et al., Consistency Models, 2023; Song and Dhariwal, 2023.
    """
    sigma = scheduler.train_sigmas()
    ones, time = np.ones_like(sigma), 250 * np.log(sigma)
    grid = Grid(time, ones, sigma, ones, sigma)
    skip, out, *_ = scheduler.prediction(grid)
    scale, told = scheduler.columns(grid)["scale"], jnp.asarray(time, jnp.float32)
    draw = timesteps or times.sampler(times.weighted(lognormal(sigma)))

    def consistent(params: Any, x: jax.Array, row: jax.Array, batch: Batch) -> jax.Array:
        c_skip, c_out, c_in = at(row, x, skip, out, scale)
        return c_skip * x + c_out * predict(params, c_in * x, told[row], batch).astype(jnp.float32)

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        k_time, k_noise = jax.random.split(key)
        x0 = batch["latents"].astype(jnp.float32)
        i, eps = draw(k_time, len(x0), len(sigma) - 1), noise(k_noise, x0.shape)
        low, high = at(i, x0, sigma[:-1], sigma[1:])
        goal = jax.lax.stop_gradient(consistent(params, x0 + low * eps, i, batch))
        error = consistent(params, x0 + high * eps, i + 1, batch) - goal
        c = 0.00054 * (x0.size // len(x0)) ** 0.5 if huber_c is None else huber_c
        return (pseudo_huber(error, c) / (high - low)).mean(), {}

    return loss


# --- one step by a score or an adversary -----------------------------------------------------------------------------


def one_step(predict: Predict, path: Path, row: int = -1, noise: Noise = jax.random.normal) -> Generate:
    """The x_0 that a network makes of pure noise in one evaluation, at a row of the path; shaped as "latents"."""

    def generate(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        z = noise(key, batch["latents"].shape)
        rows = jnp.full(len(z), row % len(path.time))
        output = predict(params, z, jnp.asarray(path.time)[rows], batch).astype(jnp.float32)
        return path.predicted(rows, z, output)[0]

    return generate


def distribution_matching(
    generate: Generate, real: Predict, fake: Predict, path: Path, *, timesteps: times.Timesteps | None = None
) -> Loss:
    """½ ‖x - sg(x - g)‖² with x = G(z) and g = (x̂_fake - x̂_real)(x_t) / mean |x - x̂_real|: the generator's loss.

    Its gradient in x is g, a step from where the generator's own samples are likely to where the teacher's are.

    Args:
      generate: the generator, e.g. `one_step(predict, path)`.
      real: the teacher, perhaps `guided`.
      fake: a network that follows the generator's samples, by `following`, in turns with this loss.
      path: of both.
      timesteps: of t; by default uniform between 0.02 T and 0.98 T.

    Reference: Yin et al., One-step Diffusion with Distribution Matching Distillation, 2023, equations 7 and 8, without
    the regression, as in Improved Distribution Matching Distillation, 2024.
    """
    T = len(path.time)
    draw = timesteps or times.sampler(min_timestep=int(0.02 * T), max_timestep=int(0.98 * T))

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        k_make, k_time, k_noise = jax.random.split(key, 3)
        x = generate(params, batch, k_make)
        fixed = jax.lax.stop_gradient(x)
        row = draw(k_time, len(x), T)
        x_t, _ = path.noised(row, fixed, jax.random.normal(k_noise, x.shape))
        told = jnp.asarray(path.time)[row]
        of = lambda ask: path.predicted(row, x_t, ask(params, x_t, told, batch).astype(jnp.float32))[0]
        x_real, x_fake = of(real), of(fake)
        size = jnp.abs(fixed - x_real).mean(range(1, x.ndim), keepdims=True)
        g = jax.lax.stop_gradient((x_fake - x_real) / jnp.maximum(size, 1e-6))
        return 0.5 * jnp.square(x - (fixed - g)).mean(), {"gradient": jnp.abs(g).mean()}

    return loss


def following(predict: Predict, generate: Generate, path: Path, **options: Any) -> Loss:
    """The denoising loss of a network on what a generator makes; options as of `denoising`."""
    inner = denoising(predict, path, **options)

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        k_make, k_loss = jax.random.split(key)
        return inner(params, {**batch, "latents": jax.lax.stop_gradient(generate(params, batch, k_make))}, k_loss)

    return loss


def diffused(predict: Predict, path: Path, rows: tuple[int, ...] = (249, 499, 749, 999)) -> Generate:
    """The x_0 that a student makes of "latents" under the noise of one of a few rows, drawn for each example."""

    def generate(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        k_row, k_noise = jax.random.split(key)
        x0 = batch["latents"].astype(jnp.float32)
        row = jax.random.choice(k_row, jnp.asarray(rows), x0.shape[:1])
        x, _ = path.noised(row, x0, jax.random.normal(k_noise, x0.shape))
        return path.predicted(row, x, predict(params, x, jnp.asarray(path.time)[row], batch).astype(jnp.float32))[0]

    return generate


def adversarial_distillation(
    generate: Generate,
    teacher: Predict,
    judge: Critic,
    path: Path,
    *,
    distillation_weight: float = 2.5,
    timesteps: times.Timesteps | None = None,
) -> Loss:
    """-E D(x̂) + λ E α_t mean (x̂ - x̂_teacher(x̂_t))²: the student's loss; the critic's is `adversarial.critic`.

    The teacher, which no gradient passes, is asked about the student's sample under new noise.

    Args:
      generate: the student, e.g. `diffused(predict, path)`.
      teacher: the teacher, perhaps `guided`.
      judge: the critic, of x_0.
      path: of both.
      distillation_weight: λ.
      timesteps: of t; by default uniform.

    Reference: Sauer et al., Adversarial Diffusion Distillation, 2023, equations 1 and 4 with exponential weighting.
    """

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        k_make, k_time, k_noise = jax.random.split(key, 3)
        x = generate(params, batch, k_make)
        row = (timesteps or times.sampler())(k_time, len(x), len(path.time))
        x_t, _ = path.noised(row, jax.lax.stop_gradient(x), jax.random.normal(k_noise, x.shape))
        output = teacher(params, x_t, jnp.asarray(path.time)[row], batch).astype(jnp.float32)
        x_teacher = jax.lax.stop_gradient(path.predicted(row, x_t, output)[0])
        (c,) = at(row, x, path.alpha)
        distillation = (c * jnp.square(x - x_teacher)).mean()
        adversary = -judge(params, x, batch).mean()
        return adversary + distillation_weight * distillation, {"adversary": adversary, "distillation": distillation}

    return loss
