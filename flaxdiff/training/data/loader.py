"""Batches ahead of time, and the position to go on from: what a training loop holds.

`DataLoader` makes batches with grain, in threads or in processes. Its state is a small dictionary; a loader that is
given it goes on with the very same batches, whatever its number of workers. A data set that can only be read from the
beginning on is a `Stream`: its state also says how much of the current pass was read.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from flaxdiff.training.data.batches import CHANCES, PATIENCE, Batch, Batches, Made, PriorPreservation, collate, share
from flaxdiff.training.data.examples import Examples, draw
from flaxdiff.training.data.faults import BadExample, Fault, Report
from flaxdiff.training.data.protocol import check_columns, needed
from flaxdiff.training.data.tables import Streamed, cells

THREADS = 4  # that make batches where there are no workers
AHEAD = 2  # batches that each of them has ready

State = dict[str, int]

log = logging.getLogger(__name__)


class DataLoader:
    """Batches without end, made ahead of time; see the module's paragraph.

    Args:
      batches: of a source with random access, of a subject and its class, or of a stream.
      num_workers: processes that make them; 0 for threads of this one. Workers import the script that starts them: keep
        what it runs under `if __name__ == "__main__":`.

    Attributes:
      report: what was left out so far; each reason is also logged once.

    >>> from PIL import Image
    >>> from flaxdiff.training.data import Batches, Examples, Listed
    >>> rows = Listed([{"image": Image.new("L", (8, 8), i), "text": str(i)} for i in range(6)])
    >>> loader = DataLoader(Batches.of(rows, Examples(resolution=8), 4))
    >>> first, state, second = next(loader), loader.get_state(), next(loader)
    >>> loader.set_state(state)
    >>> next(loader)["caption"] == second["caption"] != first["caption"]
    True
    """

    def __init__(self, batches: "Batches | PriorPreservation | Stream", num_workers: int = 0):
        self.batches, self.num_workers, self.report = batches, num_workers, Report()
        self._state: State = {"batch": 0}
        self._ahead: Iterator[tuple[Made, State]] | None = None
        self._note(batches.faults)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = self._made(self._state)
        (batch, faults), self._state = next(self._ahead)
        self._note(faults)
        return batch

    def get_state(self) -> State:
        """Where the next batch is, and what that depends on: numbers by name."""
        return {**self._state, **self.batches.signature}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on from a state.

        Raises:
          ValueError: it is that of other data, of another batch size or seed.
        """
        own = self.batches.signature
        position = {k: v for k, v in state.items() if k not in own}
        if {k: state.get(k) for k in own} != own or not {"batch"} <= position.keys() <= {"batch", "epoch", "read"}:
            raise ValueError(
                f"The position {dict(state)} is not one in this data, {own}; use the same data and options."
            )
        self.close()
        self._state = position

    def close(self) -> None:
        """Stop the workers; the next batch starts them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _note(self, faults: tuple[Fault, ...]) -> None:
        for name, reason in self.report.add(faults):
            log.warning("Left out of the training data: %s, %s.", name, reason)

    def _made(self, state: State) -> Iterator[tuple[Made, State]]:
        """What is made from a state on, each with the state that comes after it."""
        if isinstance(self.batches, Stream):
            return self.batches.made(state, self.num_workers or THREADS)
        return self._by_number(state["batch"])

    def _by_number(self, first: int) -> Iterator[tuple[Made, State]]:
        """Batches from one on, by grain."""
        grain, flags = needed("grain"), needed("absl.flags").FLAGS
        if not flags.is_parsed():  # grain asks for flags, which only absl's own way to start a program parses
            flags.mark_as_parsed()
        threads = 1 if self.num_workers else THREADS
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * threads)
        data = grain.MapDataset.source(_Endless(self.batches))[first:].to_iter_dataset(read)
        if self.num_workers:
            options = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=AHEAD)
            data = data.mp_prefetch(options)
        with contextlib.closing(iter(data)) as ahead:
            for n in itertools.count(first + 1):
                batch, faults = next(ahead)
                if self.num_workers:  # arrays lie in memory that is shared with a worker, and that is scarce
                    batch = {k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
                yield Made(batch, faults), {"batch": n}


@dataclasses.dataclass(frozen=True)
class _Endless:
    """Batches by number, as grain takes a source."""

    batches: Any

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, n: int) -> Made:
        return self.batches.make(n)


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Batches of a source that is read from the beginning on, see `of`.

    A process makes its batches of its own share of the rows. So a position is good for the same number of processes.
    """

    source: Streamed
    examples: Examples
    batch_size: int
    seed: int
    shuffle: bool
    process: tuple[int, int]

    @classmethod
    def of(
        cls,
        source: Streamed,
        examples: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        max_train_samples: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Self:
        """Batches of a stream; arguments as of `Batches.of`, of which `max_train_samples` takes the first.

        Raises:
          ValueError: a column that is not there, buckets, a batch that does not divide.
        """
        check_columns(source, examples.columns)
        if examples.aspect_ratio_buckets:
            raise ValueError(
                "A stream cannot be sorted into aspect_ratio_buckets; leave out streaming, or the buckets."
            )
        if max_train_samples is not None:
            source = dataclasses.replace(source, table=source.table.take(max_train_samples))
        first, last = share(batch_size, process_index, process_count)
        return cls(source, examples, last - first, seed, shuffle, (process_index, process_count))

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self.source.faults

    @property
    def signature(self) -> dict[str, int]:
        """What a position in the stream depends on."""
        return {"batch_size": self.batch_size, "seed": self.seed, "processes": self.process[1]}

    def made(self, state: State, threads: int) -> Iterator[tuple[Made, State]]:
        """What is made from a state on, each with the state that comes after it."""
        examples, faults = [], []
        number, in_a_row = state["batch"], 0
        for made, where in self._examples(state, threads):
            if isinstance(made, Fault):
                faults.append(made)
                in_a_row += 1
                if in_a_row == PATIENCE:
                    raise ValueError(f"None of {PATIENCE} examples in a row is of use:\n{Report.of(faults)}")
                continue
            in_a_row = 0
            examples.append(made)
            if len(examples) == self.batch_size:
                number += 1
                yield Made(collate(examples), tuple(faults)), {"batch": number, **where}
                examples, faults = [], []

    def _examples(self, state: State, threads: int) -> Iterator[tuple[dict[str, Any] | Fault, State]]:
        """Examples and faults in the order of the rows, made in threads, each with the position after it."""
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            ahead = collections.deque()
            for row, epoch, i in self._rows(state.get("epoch", 0), state.get("read", 0)):
                ahead.append((pool.submit(self._example, row, epoch, i), {"epoch": epoch, "read": i + 1}))
                if len(ahead) > AHEAD * max(threads, self.batch_size):
                    future, where = ahead.popleft()
                    yield future.result(), where

    def _rows(self, epoch: int, read: int) -> Iterator[tuple[Mapping[str, Any], int, int]]:
        """Rows of this process with their pass and their number in it, from some place on, without end."""
        while True:
            rows = self.source.rows(self.seed if self.shuffle else None, epoch, *self.process)
            i = -1
            for i, row in enumerate(rows):
                if i >= read:
                    yield row, epoch, i
            if i < 0:
                raise ValueError(f"{self.source.title} has no rows for process {self.process[0]}.")
            epoch, read = epoch + 1, 0

    def _example(self, row: Mapping[str, Any], epoch: int, i: int) -> dict[str, Any] | Fault:
        chances = draw(self.seed, CHANCES, self.process[0], epoch, i)
        try:
            return self.examples.make(cells(row), chances, self.examples.size)
        except BadExample as error:
            return Fault(f"{self.source.title}, row {i} of pass {epoch}", str(error))
