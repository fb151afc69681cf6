"""Fine-tuning by what people, or a function, like: DDPO, DRaFT and Diffusion-DPO.

DDPO treats each step of the sampler as a decision and strengthens those that led to more reward; the reward may be any
number. DRaFT differentiates a reward through the last steps of the sampling loop. Diffusion-DPO needs no reward but
pairs of pictures of which one was preferred. All give losses in the sense of `state.Loss`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.pipelines.generate import Program, for_decoder
from flaxdiff.schedulers import tables
from flaxdiff.training import timesteps as times
from flaxdiff.training.losses import Batch, Predict, squared
from flaxdiff.training.noising import Noise, Path, at
from flaxdiff.training.state import Loss

# --- DDPO ------------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """A run of a sampler that draws: n rows of its plan.

    Attributes:
      samples: x before each row, and the result, [n + 1, B, ...].
      log_probs: of each next x, as the network was then, [n, B]; 0 where a row draws nothing.
    """

    samples: jax.Array
    log_probs: jax.Array


def drawing(plan: tables.Plan) -> tables.Plan:
    """The plan, if its steps are draws that follow from the sample alone.

    Raises:
      ValueError: it remembers earlier steps, or never draws.
    """
    rows = slice(0, int(plan.steps))
    if np.any(plan.mix[rows, 0, 1 : tables.SLOTS]):
        raise ValueError("The scheduler's steps look back at earlier ones: take DDIMScheduler().plan(n, eta=1.0).")
    if not np.any(plan.noisy):
        raise ValueError("The scheduler draws no noise, so that no step has a probability: take plan(n, eta=1.0).")
    return jax.tree.map(lambda a: np.asarray(a)[rows] if np.ndim(a) else a, plan)


def transition(plan: tables.Plan, row: jax.Array, x: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean [B, ...] and the standard deviation [B, 1, ...] of the next x, by a row of the plan for each example."""
    plan = jax.tree.map(jnp.asarray, plan)

    def mean(row: jax.Array, x: jax.Array, output: jax.Array) -> jax.Array:
        slots = jnp.zeros((tables.SLOTS, 1, *x.shape)).at[0, 0].set(x)
        state = tables.SchedulerState(plan, slots, row, None)
        return plan.advance(state, output[None], jnp.zeros((1, *x.shape))).sample[0]

    return jax.vmap(mean)(row, x, output), plan.mix[row, 0, -1].reshape(-1, *[1] * (x.ndim - 1))


def log_density(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """log N(x; mean, std²) as a mean over dimensions [B]; 0 where std is 0."""
    safe = jnp.where(std > 0, std, 1)
    each = -jnp.square((x - mean) / safe) / 2 - jnp.log(safe) - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.where(std > 0, each, 0).mean(range(1, x.ndim))


def rollout(
    predict: Predict, plan: tables.Plan, params: Any, batch: Batch, latents: jax.Array, key: jax.Array
) -> Trajectory:
    """Sample, and keep every step and its log-probability.

    Args:
      predict: (params, x, t, batch) -> output, guidance included.
      plan: of a scheduler that draws, as `DDIMScheduler().plan(n, eta=1.0)`.
      params, batch: for `predict`.
      latents: [B, ...] to start from.
      key: from which image b draws by fold_in(key, b).

    Raises:
      As `drawing`.

    Reference: Black et al., Training Diffusion Models with Reinforcement Learning, 2023.
    """
    plan, keys = jax.tree.map(jnp.asarray, drawing(plan)), tables.image_keys(key, len(latents))

    def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        row = jnp.full(len(x), i)
        output = predict(params, plan.scale[i] * x, plan.timesteps[row], batch).astype(jnp.float32)
        mean, std = transition(plan, row, x, output)
        to = mean + std * tables.draw(keys, i)(x)
        return to, (x, log_density(to, mean, std))

    x, (before, log_probs) = jax.lax.scan(body, latents.astype(jnp.float32), jnp.arange(len(plan.timesteps)))
    return Trajectory(jnp.concatenate([before, x[None]]), log_probs)


def advantages(rewards: Sequence[float], prompts: Sequence[str] | None = None) -> np.ndarray:
    """(r - mean) / std of the rewards of the same prompt, or of all rewards, float32 [B].

    >>> advantages([1.0, 3.0, 10.0, 30.0], ["cat", "cat", "dog", "dog"]).round(3)
    array([-1.,  1., -1.,  1.], dtype=float32)
    """
    rewards = np.asarray(rewards, np.float32)
    group = np.zeros(len(rewards)) if prompts is None else np.asarray(prompts)
    result = np.zeros_like(rewards)
    for same in (group == name for name in np.unique(group)):
        result[same] = (rewards[same] - rewards[same].mean()) / (rewards[same].std() + 1e-6)
    return result


def decisions(trajectory: Trajectory, plan: tables.Plan, advantage: jax.Array, batch: Batch) -> dict[str, Any]:
    """The steps of a trajectory that draw as examples for `ddpo`, the conditions [B, ...] in `batch` with each.

    Their order is by step, then by image: shuffle them before they are divided into batches.
    """
    (rows,) = np.nonzero(np.asarray(plan.noisy[: int(plan.steps)]))
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    again = lambda a: flat(jnp.broadcast_to(a, (len(rows), *jnp.shape(a))))
    return {
        **jax.tree.map(again, dict(batch)),
        "latents": flat(trajectory.samples[rows]),
        "next": flat(trajectory.samples[rows + 1]),
        "log_prob": flat(trajectory.log_probs[rows]),
        "row": jnp.repeat(jnp.asarray(rows), trajectory.samples.shape[1]),
        "advantage": again(jnp.asarray(advantage)),
    }


def ddpo(predict: Predict, plan: tables.Plan, *, clip_range: float = 1e-4, adv_clip_max: float = 5.0) -> Loss:
    """E max(-A r, -A clip(r, 1 - c, 1 + c)) with r = p_θ(x_{t-1} | x_t) / p_then(x_{t-1} | x_t), as PPO has it.

    Args:
      predict, plan: as of `rollout`.
      clip_range: c.
      adv_clip_max: the largest |A|.

    The batch is of `decisions`.

    Raises:
      As `drawing`.

    Reference: Black et al., 2023, equation 4; Schulman et al., Proximal Policy Optimization Algorithms, 2017.
    """
    plan = drawing(plan)

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        row, x = batch["row"], batch["latents"]
        (scale,) = at(row, x, plan.scale)
        output = predict(params, scale * x, jnp.asarray(plan.timesteps)[row], batch).astype(jnp.float32)
        change = log_density(batch["next"], *transition(plan, row, x, output)) - batch["log_prob"]
        ratio, a = jnp.exp(change), jnp.clip(batch["advantage"], -adv_clip_max, adv_clip_max)
        clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
        metrics = {"approx_kl": jnp.square(change).mean() / 2, "clipfrac": (jnp.abs(ratio - 1) > clip_range).mean()}
        return jnp.maximum(-a * ratio, -a * clipped).mean(), metrics

    return loss


# --- DRaFT -----------------------------------------------------------------------------------------------------------


def draft(program: Program, reward: Callable[[jax.Array, Mapping[str, Any]], jax.Array], k: int = 1) -> Loss:
    """-E r(x_0), differentiated through the decoder and the last K steps of the sampling loop: DRaFT-K.

    Args:
      program: of a pipeline, `pipe.program`.
      reward: (pictures [B, H, W, C] in [0, 1], inputs) -> [B].
      k: K; the steps before are made without gradients, and keep nothing.

    The batch is what `pipe.prepare_inputs` makes.

    Raises:
      ValueError: K is not positive.

    Reference: Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards, 2023.
    """
    if k < 1:
        raise ValueError(f"k={k}: gradients must flow through one step at least.")

    def loss(params: Any, inputs: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        conditions, state = program.begin(params, key, inputs)
        fixed = jax.lax.stop_gradient((params, conditions))
        ahead = jnp.maximum(jnp.asarray(inputs["plan"].steps) - k, 0)
        state = jax.lax.stop_gradient(state)
        state = jax.lax.fori_loop(0, ahead, lambda i, state: program.step(*fixed, state), state)
        state = jax.lax.stop_gradient(state)
        last = jax.checkpoint(lambda state: program.step(params, conditions, state))
        go = lambda state, i: (jax.lax.cond(ahead + i < inputs["plan"].steps, last, lambda s: s, state), None)
        state, _ = jax.lax.scan(go, state, jnp.arange(k))
        rewards = reward(program.decode(params, state.sampler.sample, for_decoder(inputs)), inputs)
        return -rewards.mean(), {"reward": rewards.mean()}

    return loss


# --- preferences -----------------------------------------------------------------------------------------------------

# How much better than the reference the preferred picture must be denoised, beside the other.
PREFERENCES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "sigmoid": lambda logits, beta: -jax.nn.log_sigmoid(beta * logits),
    "hinge": lambda logits, beta: jax.nn.relu(1 - beta * logits),
    "ipo": lambda logits, beta: jnp.square(logits - 1 / (2 * beta)),
}


def diffusion_dpo(
    predict: Predict,
    reference: Predict,
    path: Path,
    *,
    beta_dpo: float = 2500.0,
    loss_type: str = "sigmoid",
    timesteps: times.Timesteps | None = None,
    noise: Noise = jax.random.normal,
) -> Loss:
    """-E log σ(β [(e_ref^w - e_ref^l) - (e^w - e^l)]), e the squared errors on the preferred picture w and the other l.

    Args:
      predict: the network that learns.
      reference: what it began as, e.g. `distillation.adapterless(predict)`.
      path: of the scheduler.
      beta_dpo: β.
      loss_type: "sigmoid"; or "hinge" or "ipo", margins in its place.
      timesteps, noise: as of `denoising`; both of a pair have the same.

    The batch holds "latents" [2B, ...], the preferred in the first half and the others, in the same order, in the
    second; conditions are as many.

    Raises:
      ValueError: another loss; at tracing, a batch without halves.

    Reference: Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization, 2023, equation 14.
    """
    if loss_type not in PREFERENCES:
        raise ValueError(f"loss_type={loss_type!r} is not known; use one of {sorted(PREFERENCES)}.")

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x0 = batch["latents"].astype(jnp.float32)
        if len(x0) % 2:
            raise ValueError(f"A batch of {len(x0)} is not of pairs: give the preferred, then as many others.")
        k_time, k_noise = jax.random.split(key)
        row = (timesteps or times.sampler())(k_time, len(x0) // 2, len(path.time))
        eps = noise(k_noise, (len(x0) // 2, *x0.shape[1:]))
        row, eps = jnp.concatenate([row, row]), jnp.concatenate([eps, eps])
        x, target = path.noised(row, x0, eps)
        error = lambda ask: squared(ask(params, x, jnp.asarray(path.time)[row], batch).astype(jnp.float32) - target)
        ahead = lambda each: jnp.subtract(*jnp.split(each, 2))
        own = error(predict)
        logits = ahead(jax.lax.stop_gradient(error(reference))) - ahead(own)
        accuracy = (1 + jnp.sign(logits).mean()) / 2
        return PREFERENCES[loss_type](logits, beta_dpo).mean(), {"implicit_acc": accuracy, "denoising": own.mean()}

    return loss
