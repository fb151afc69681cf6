"""The loop around a training step: data, checkpoints (see checkpoints.py), what the watcher sees.

A run is a function of its configuration: the data are a function of a position that is saved, random numbers are the
run's key folded with the step, and a checkpoint is written beside the old one and then renamed. So a run that is killed
and started again by the same command goes on from its last checkpoint and ends with the same bits. The device is never
waited for but where a number is shown: a step is on its way before the one before it is looked at.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils

from flaxdiff.training import report
from flaxdiff.training.checkpoints import Keeper
from flaxdiff.training.state import TrainState


def arguments(description: str | None) -> tuple[dict[str, Any], Path]:
    """The configuration and the model's folder that a launch script is given: `script.py CONFIG --out FOLDER`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/")
    parser.add_argument("--out", required=True, type=Path, help="the model's folder; earlier parts are read from it")
    given = parser.parse_args()
    return json.loads(Path(given.config).read_text()), given.out


# --- data ------------------------------------------------------------------------------------------------------------


class Data(Protocol):
    """Batches without end, from a position that can be read and set, as grain's iterators have it."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Counted:
    """Batches that are a pure function of their number.

    >>> data = Counted(lambda n: 10 * n)
    >>> next(data), next(data), data.get_state()
    (0, 10, 2)
    """

    def __init__(self, batch_at: Callable[[int], Any]):
        self.batch_at, self.position = batch_at, 0

    def __next__(self) -> Any:
        self.position += 1
        return self.batch_at(self.position - 1)

    def get_state(self) -> int:
        return self.position

    def set_state(self, state: int) -> None:
        self.position = state


def ahead(data: Data, count: int, place: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """So many batches where `place` puts them, each with the position after it; the next is prepared in a thread."""

    def one() -> tuple[Any, Any]:
        return place(next(data)), data.get_state()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        pending = thread.submit(one) if count else None
        for n in range(count):
            batch = pending.result()
            if n + 1 < count:
                pending = thread.submit(one)
            yield batch


# --- the run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """Whether SIGTERM came, as clouds send it some time before they take a machine; on all processes at one step."""
    told = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set()) if main and jax.process_count() == 1 else None
    try:
        yield multihost_utils.reached_preemption_sync_point if jax.process_count() > 1 else lambda step: told.is_set()
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def fit(
    step: Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    data: Data | Callable[[int], Any],
    key: jax.Array,
    steps: int,
    *,
    directory: str | Path | None = None,
    save_every: int = 1000,
    keep: int = 2,
    best: str | None = None,
    log_every: int = 100,
    writers: Sequence[report.Writer] = (report.line,),
    validate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    validate_every: int = 1000,
    place: Callable[[Any], Any] = lambda batch: batch,
    profile: tuple[int, int] | None = None,
    examples: int | None = None,
) -> TrainState:
    """Train until `state.step` is `steps`; resume from `directory` where it holds a checkpoint.

    After SIGTERM the state is saved, and the process ends with exit status 0.

    Args:
      step: a compiled `train_step`; it may take the memory of the state that it is given.
      state: where to start when there is no checkpoint; says what a checkpoint must look like, and where it lies.
      data: batches; or the batch of a step, a pure function of its number.
      key: the key of the run.
      steps: how many updates in all.
      directory: where checkpoints go.
      save_every, log_every, validate_every: in steps.
      keep: how many checkpoints.
      best: a figure of `validate` by which the best is kept as well; "-name" where less is better.
      writers: what takes the figures, see report.py; of several processes, those of the first.
      validate: state -> figures and pictures by name.
      place: puts a batch on the devices.
      profile: the first step and the last of a trace, which goes to a folder "profile" in `directory`.
      examples: in a batch, to say how many are seen in a second.

    Raises:
      FloatingPointError: the loss is not finite; the last checkpoint is of before.
      OSError, ValueError: see `Keeper`.
    """
    data = Counted(data) if callable(data) else data
    writers = writers if jax.process_index() == 0 else ()
    tell = lambda n, found: [write(report.Moment(n, steps, found)) for write in writers]
    keeper = None if directory is None else Keeper.of(directory, state, keep, best)
    if keeper and (found := keeper.restore(state, key)):
        state, position = found
        data.set_state(position)
        tell(int(state.step), {"resumed": int(state.step)})

    first = int(state.step)
    if validate and first == 0:
        tell(first, validate(state))
    watch, late = report.Stopwatch(first, examples), None
    metrics: Mapping[str, Any] = {}
    with asked_to_stop() as stopped, contextlib.ExitStack() as trace, contextlib.ExitStack() as last_of_all:
        if keeper:
            last_of_all.callback(keeper.close)
        for n, (batch, position) in enumerate(ahead(data, steps - first, place), first + 1):
            if profile and n == profile[0]:
                trace.enter_context(jax.profiler.trace(str(Path(directory or ".") / "profile")))
            if examples and not watch.flops:
                watch.flops = report.flops(step, state, batch, key)
            state, told = step(state, batch, key)
            if late:
                _shown(*late, watch, tell)
            last, stop = n == steps, stopped(n)
            late = (n, told) if n % log_every == 0 or last or stop else None
            jax.block_until_ready(metrics)  # one step is under way while another is sent, and no more
            metrics = told
            if profile and n == profile[1]:
                jax.block_until_ready(metrics)
                trace.close()
            due = keeper and (n % save_every == 0 or last or stop)
            if late and (due or last):
                late = _shown(*late, watch, tell)
            if due:
                _checked(n, told)
            judged = validate(state) if validate and (n % validate_every == 0 or last) else {}
            if judged:
                tell(n, judged)
            if due:
                figures = {name: float(value) for name, value in judged.items() if isinstance(value, (int, float))}
                keeper.save(state, position, key, figures)
            if stop:
                raise SystemExit(0)
    return state


def _shown(n: int, metrics: Mapping[str, jax.Array], watch: report.Stopwatch, tell: Callable) -> None:
    """Hand on the figures of a step, and its time."""
    values = {name: float(value) for name, value in jax.device_get(_checked(n, metrics)).items()}
    first = {"loss": values.pop("loss")} if "loss" in values else {}
    tell(n, first | values | watch.lap(n))


def _checked(n: int, metrics: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """The metrics, if the loss is a number. Raises FloatingPointError otherwise."""
    if not math.isfinite(loss := float(metrics.get("loss", 0.0))):
        raise FloatingPointError(
            f"The loss is {loss} at step {n}. Try a lower learning rate, clipping or a longer warm-up; a run in this "
            "folder goes on from the last checkpoint."
        )
    return metrics
