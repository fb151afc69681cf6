"""The loop around a training step: data, checkpoints, what the watcher sees.

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
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flaxdiff.training import report
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
        pending = thread.submit(one)
        for n in range(count):
            batch = pending.result()
            if n + 1 < count:
                pending = thread.submit(one)
            yield batch


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Keeper(NamedTuple):
    """Checkpoints of a run in a folder: the state without what is frozen, the position in the data, the key."""

    manager: ocp.CheckpointManager

    @classmethod
    def of(cls, folder: str | Path, state: TrainState, keep: int = 2, best: str | None = None) -> "Keeper":
        """Checkpoints in a folder.

        Args:
          folder: made if it is not there.
          state: what will be saved, to see that it fits.
          keep: how many of the last stay.
          best: a validation figure whose best checkpoint stays as well; "-name" where less is better.

        Raises:
          OSError: the folder cannot be written, or the disk has no room for the checkpoints.
        """
        folder = Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder / ".writable").touch()
            (folder / ".writable").unlink(missing_ok=True)
        size, free = sum(leaf.nbytes for leaf in jax.tree.leaves(kept(state))), shutil.disk_usage(folder).free
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # of a run that goes on
        if (keep + 1) * size > free + there:
            raise OSError(
                f"{folder}: {keep + 1} checkpoints of {size / 1e9:.2f} GB do not fit into the {free / 1e9:.2f} GB "
                "that are free; make room, or keep fewer."
            )
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if best is not None:
            worth = lambda metrics: metrics.get(best.removeprefix("-"), math.inf if best[0] == "-" else -math.inf)
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=worth, reverse=best[0] == "-", n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(preservation_policy=preservation_policy.AnyPreservationPolicy(policies))
        return cls(ocp.CheckpointManager(folder, options=options))

    def save(
        self, state: TrainState, position: Any, key: jax.Array, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begin to write a checkpoint; training goes on."""
        beside = {"data": position, "key": jax.random.key_data(key).tolist()}
        items = ocp.args.Composite(state=ocp.args.StandardSave(kept(state)), beside=ocp.args.JsonSave(beside))
        self.manager.save(int(state.step), args=items, metrics=dict(metrics) if metrics else None, force=True)

    def restore(self, state: TrainState, key: jax.Array) -> tuple[TrainState, Any] | None:
        """The last whole checkpoint, laid out over devices as `state` is, whose arrays are given up for it, and the
        position in the data; None if there is none.

        Raises:
          ValueError: it is of another run: another key, other parameters or another optimiser.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        found = self.manager.restore(step, args=ocp.args.Composite(beside=ocp.args.JsonRestore()))["beside"]
        if found["key"] != jax.random.key_data(key).tolist():
            raise ValueError(f"{self.manager.directory} is of a run with another seed; use its seed or another folder.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, kept(state))
        jax.tree.map(lambda a: a.delete(), kept(state))  # its memory is for what is read
        try:
            items = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self.manager.directory} holds a run with other parameters or another optimiser; use its settings or "
                f"another folder. {str(error).splitlines()[0]}"
            ) from error
        return state._replace(**items["state"]), found["data"]

    def close(self) -> None:
        """Wait until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def kept(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state."""
    return {name: value for name, value in state._asdict().items() if name != "frozen"}


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
