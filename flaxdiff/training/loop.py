"""The loop around a training step: data, progress, checkpoints.

A run is a function of its configuration: batch n is a pure function of n, random numbers are the run's key folded
with n, and a checkpoint is written beside the old one and then renamed. So a run that is killed and started again by
the same command goes on from its last checkpoint and ends with the same bits.
"""

import argparse
import concurrent.futures
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flaxdiff.training.state import TrainState


def arguments(description: str | None) -> tuple[dict[str, Any], Path]:
    """The configuration and the model's folder that a launch script is given: `script.py CONFIG --out FOLDER`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/")
    parser.add_argument("--out", required=True, type=Path, help="the model's folder; earlier parts are read from it")
    given = parser.parse_args()
    return json.loads(Path(given.config).read_text()), given.out


def fit(
    step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    batch_at: Callable[[int], Any],
    key: jax.Array,
    steps: int,
    *,
    directory: str | Path | None = None,
    save_every: int = 1000,
    log_every: int = 100,
    log: Callable[[str], None] = lambda line: print(line, flush=True),
) -> TrainState:
    """Train until `state.step` is `steps`; resume from `directory` where it holds a checkpoint.

    Args:
      step: a compiled `train_step`; it may take the memory of the state that it is given.
      state: where to start when there is no checkpoint; says what a checkpoint must look like.
      batch_at: the batch of a step; prepared one step ahead in a thread.
      key: the key of the run.
      steps: how many updates in all.
      directory: where checkpoints go; the last two are kept.
      save_every, log_every: in steps.
      log: what takes a line of progress: the metrics' values and the speed.
    """
    manager = None
    if directory is not None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)
        if manager.latest_step() is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))
            log(f"resumed at step {int(state.step)}")

    first = done = int(state.step)
    clock, since = time.perf_counter(), done
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(batch_at, first)
        for n in range(first, steps):
            batch = pending.result()
            pending = ahead.submit(batch_at, n + 1) if n + 1 < steps else None
            state, metrics = step(state, batch, key)
            done = n + 1
            if done % log_every == 0 or done == steps:
                values = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
                now = time.perf_counter()
                log(f"step {done}/{steps}  {values}  {(done - since) / (now - clock):.2f} steps/s")
                clock, since = now, done
            if manager is not None and (done % save_every == 0 or done == steps):
                manager.save(done, args=ocp.args.StandardSave(state))
    if manager is not None:
        manager.close()
    return state
