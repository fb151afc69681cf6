"""Checkpoints of a run in a folder: what moves, the optimiser, the place in the data, the key.

They are written while training goes on, beside those that there are, and appear when they are whole. A run on other
devices reads them to where its own state lies.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flaxdiff.checkpoint import files
from flaxdiff.training.state import TrainState


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
          ValueError: it is a URL.
        """
        folder = files.local(folder).absolute()
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
        beside = {"data": of_all(position), "key": jax.random.key_data(key).tolist()}
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
        return state._replace(**items["state"]), of_one(found["data"], jax.process_index())

    def close(self) -> None:
        """Wait until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()


def of_all(position: Any) -> list[Any]:
    """The positions of all processes, in their order: each may have passed over other rows of a stream.

    >>> of_all({"batch": 3})
    [{'batch': 3}]
    """
    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    gather = lambda a: multihost_utils.process_allgather(a).reshape(jax.process_count(), -1)
    longest = int(gather(np.int32(text.size)).max())
    return [json.loads(row.tobytes()) for row in gather(np.pad(text, (0, longest - text.size), constant_values=32))]


def of_one(positions: Any, process_index: int) -> Any:
    """The position that is a process's. Where there were fewer processes, that of the last: batches by number have one
    position for all, and a stream sees that it is not its own.

    >>> of_one([{"read": 3}, {"read": 4}], 1)
    {'read': 4}
    """
    positions = positions if isinstance(positions, list) else [positions]  # of one process, in older checkpoints
    return positions[min(process_index, len(positions) - 1)]


def kept(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state."""
    return {name: value for name, value in state._asdict().items() if name != "frozen"}
