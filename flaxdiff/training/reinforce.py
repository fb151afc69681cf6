"""DDPO as a run: draw pictures, judge them, strengthen the steps that led to the better ones; and again.

A round is `sample_batch_size` pictures of as many captions; each of their steps is an example of the round's updates. A
checkpoint is written behind each round.

Reference: Black et al., Training Diffusion Models with Reinforcement Learning, 2023.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import registry
from flaxdiff.pipelines.generate import Size
from flaxdiff.training import distillation, loop, noising, report, rewards, state
from flaxdiff.training.checkpoints import Keeper
from flaxdiff.training.config import Config
from flaxdiff.training.data import DataLoader
from flaxdiff.training.diffusion import conditions, predict, wordless
from flaxdiff.training.recipes import Components, Recipe, reward

Batch = Mapping[str, Any]


def reinforce(config: Config, made: Recipe, data: DataLoader, tx: Any, writers: Sequence[report.Writer]) -> Components:
    """Run a recipe whose pictures are judged: of the data the captions count, round by round.

    Returns:
      The parameters, with the LoRA on them.

    Raises:
      ValueError: the steps of a round do not divide into batches, or something is asked for that is not there.
    """
    given, folder = config.objective, Path(config.run.output)
    pipe, judge, side = made.pipe, reward(given.reward), config.data.resolution
    plan = registry.find("DDIMScheduler").from_config(pipe.scheduler).plan(given.num_inference_steps, eta=1.0)
    asked = _guided(config, pipe)
    count, size = data.batches.order.batch_size, config.run.train_batch_size
    examples = count * int(np.sum(rewards.drawing(plan).noisy))
    if examples % size:
        raise ValueError(f"A round has {examples} steps to learn from; train_batch_size={size} must divide them.")
    updates, rounds = examples // size, config.run.max_train_steps * size // examples
    if not rounds:
        raise ValueError(f"max_train_steps={config.run.max_train_steps}: a round has {updates} updates; give as many.")
    if jax.process_count() > 1 or config.run.use_ema or config.run.validation_prompt or config.run.validation_batches:
        raise ValueError(f"{config.recipe} runs in one process, without use_ema and validation; leave these out.")
    if noising.path_of(pipe.scheduler).prediction_type == "flow_prediction":
        raise ValueError(
            f"{type(pipe).__name__} is a flow, whose steps draw nothing; {config.recipe} is for diffusion."
        )

    shape = (count, *pipe.family.latent_shape(dict(pipe.specs), Size(side, side)))
    roll = jax.jit(lambda *args: rewards.rollout(asked, plan, *args))
    decode = jax.jit(pipe.program.decode)
    dtype = {"dtype": jnp.bfloat16} if config.run.mixed_precision == "bf16" else {}
    step = state.jitted(rewards.ddpo(asked, plan, clip_range=given.clip_range), tx, **dtype)
    now = state.create(made.params, tx, made.trainable, average=False)
    key = jax.random.key(config.run.seed)
    keeper = Keeper.of(folder / "checkpoints", now, config.run.checkpoints_total_limit)
    now = (keeper.restore(now, key) or (now,))[0]

    def round_from(now: state.TrainState, n: int) -> state.TrainState:
        captions = data.batches[n]["caption"]
        of_round = jax.random.split(jax.random.fold_in(key, n), 3)
        batch = {"conditions": conditions(pipe, prompt=captions, height=side, width=side)}
        batch["keys"] = jax.random.split(of_round[0], len(captions))
        trajectory = roll(now.params, batch, jax.random.normal(of_round[1], shape), of_round[2])
        found = np.asarray(judge(decode(now.params, trajectory.samples[-1])))
        steps = _decisions(trajectory, plan, rewards.advantages(found), batch, of_round[0])
        _tell(writers, n, config, updates, found)
        part = lambda i: jax.tree.map(lambda a: a[_rows(i - n * updates, size)] if a.ndim else a, steps)
        source = loop.Counted(part)
        source.set_state(n * updates)
        every = config.run.logging_steps
        return loop.fit(step, now, source, key, (n + 1) * updates, writers=writers, log_every=every)

    with contextlib.closing(keeper), loop.asked_to_stop() as stopped:
        for n in range(int(now.step) // updates, rounds):
            now = round_from(now, n)
            keeper.save(now, n + 1, key)
            if stopped(n):
                raise SystemExit(0)
    return now.params


def _rows(i: int, size: int) -> slice:
    return slice(i * size, (i + 1) * size)


def _tell(writers: Sequence[report.Writer], n: int, config: Config, updates: int, found: np.ndarray) -> None:
    for write in writers:
        write(report.Moment(n * updates, config.run.max_train_steps, {"reward": float(found.mean())}))


def _guided(config: Config, pipe: Any) -> Any:
    """The network as it is asked while it draws."""
    scale, ask = config.objective.guidance_scale, predict(pipe)
    return ask if scale <= 1 else distillation.guided(ask, wordless(pipe, config.data.resolution), scale)


def _decisions(trajectory: rewards.Trajectory, plan: Any, advantage: np.ndarray, batch: Batch, key: jax.Array) -> Batch:
    """The steps of a round in random order; what all pictures share stays one number."""
    shared = {name: value for name, value in batch["conditions"].items() if not np.ndim(value)}
    own = {name: value for name, value in batch["conditions"].items() if name not in shared}
    steps = rewards.decisions(trajectory, plan, advantage, {**batch, "conditions": own})
    order = jax.random.permutation(key, len(steps["row"]))
    steps = jax.tree.map(lambda a: jnp.asarray(a)[order], steps)
    return {**steps, "conditions": steps["conditions"] | shared}
