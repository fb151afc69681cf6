"""Batches for a training run: which examples, made by which chances, and where a run that stops goes on.

Batch n of a source with random access is a pure function of n: `batches[n]`. Whatever the number of processes, workers
and restarts, a run sees the same pictures, cut and flipped alike, in the same order; a `DataLoader` only makes them
ahead of time. An example that turns out to be of no use is replaced by the one that follows it in the pass.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from flaxdiff.training.data.examples import Examples, draw
from flaxdiff.training.data.faults import BadExample, Fault, Report
from flaxdiff.training.data.order import Order
from flaxdiff.training.data.pictures import Size
from flaxdiff.training.data.protocol import Source, check_columns

CHOICE, CHANCES = 3, 4  # what random numbers are for; order.py has 1 and 2
PATIENCE = 1000  # examples of no use in a row before it is the data set's fault

Batch = dict[str, Any]  # arrays [B, …], and lists of B captions


class Made(NamedTuple):
    """A batch, and the examples that were passed over in making it."""

    batch: Batch
    faults: tuple[Fault, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a source with random access, see `of`.

    Attributes:
      source: where examples come from.
      examples: what is made of them.
      order: which is where.
      sizes: of the pictures of each group, (height, width).
      rows: the first and the last but one of a batch's rows that are this process's.
      faults: what was left out beforehand.
    """

    source: Source
    examples: Examples
    order: Order
    sizes: tuple[Size, ...]
    rows: tuple[int, int]
    faults: tuple[Fault, ...]

    @classmethod
    def of(
        cls,
        source: Source,
        examples: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        max_train_samples: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Self:
        """Batches of examples.

        Args:
          source: from `open_source`.
          examples: what to make of its rows.
          batch_size: of all processes together.
          seed: of the order and of all chances.
          shuffle: else examples come in the source's order.
          max_train_samples: use so many examples, drawn once.
          process_index, process_count: `jax.process_index()` and `jax.process_count()`: each process makes its rows of
            every batch.

        Raises:
          ValueError: a column that is not there, no example of use, a batch that does not divide.

        >>> from PIL import Image
        >>> rows = Listed([{"image": Image.new("L", (8, 8), i), "text": str(i)} for i in range(6)])
        >>> batches = Batches.of(rows, Examples(resolution=8), 4)
        >>> batches[0]["image"].shape, sorted(batches[0]["caption"] + batches[1]["caption"][:2])
        ((4, 8, 8, 3), ['0', '1', '2', '3', '4', '5'])
        """
        if not hasattr(source, "__len__"):
            raise ValueError("A source that is read from the beginning on has no batches by number; use Stream.of.")
        check_columns(source, examples.columns)
        rows = share(batch_size, process_index, process_count)
        chosen, faults = np.arange(len(source)), list(source.faults)
        if max_train_samples is not None and max_train_samples < len(chosen):
            if max_train_samples < 1:
                raise ValueError(f"max_train_samples={max_train_samples}: use at least one example.")
            drawn = np.random.default_rng((seed, CHOICE)).permutation(len(chosen))
            chosen = np.sort(drawn[:max_train_samples])
        groups = examples.grouped(source, chosen, faults)
        if not any(groups.values()):
            raise ValueError(f"No example is of use:\n{Report.of(faults)}")
        order = Order(tuple(map(np.asarray, groups.values())), batch_size, seed, shuffle)
        made = cls(source, examples, order, tuple(groups), rows, tuple(faults))
        for group in range(len(order.groups)):
            made.example(group, 0, [])  # so that a data set of no use is told now
        return made

    @property
    def num_examples(self) -> int:
        """Examples in a pass over all."""
        return self.order.total

    @property
    def signature(self) -> dict[str, int]:
        """What a position in the stream depends on."""
        return {"examples": self.num_examples, "batch_size": self.order.batch_size, "seed": self.order.seed}

    def __getitem__(self, n: int) -> Batch:
        """Batch n, of this process's rows."""
        return self.make(n).batch

    def make(self, n: int) -> Made:
        """Batch n, and what was passed over."""
        group, before = self.order.place(n)
        first, faults = before * self.order.batch_size, []
        return Made(collate(self.example(group, first + row, faults) for row in range(*self.rows)), tuple(faults))

    def example(self, group: int, place: int, faults: list[Fault]) -> dict[str, Any]:
        """The example at a place of a group's stream, or the next of use in its pass.

        Raises:
          ValueError: there is none.
        """
        chances, wrong = draw(self.order.seed, CHANCES, group, place), []
        for further in range(min(PATIENCE, len(self.order.groups[group]))):
            i = self.order.example(group, place, further)
            try:
                return self.examples.make(self.source[i], chances, self.sizes[group])
            except BadExample as error:
                wrong.append(Fault(self.source.name(i), str(error)))
                faults.append(wrong[-1])
        raise ValueError(f"None of {len(wrong)} examples in a row is of use:\n{Report.of(wrong)}")


@dataclasses.dataclass(frozen=True, eq=False)
class PriorPreservation:
    """Batches of a subject, each followed by one of its class: rows [0, B) and [B, 2 B).

    Attributes:
      instance: batches of the subject.
      prior: of its class, of the same size and parts.

    Reference: Ruiz et al., DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation, 2022.
    """

    instance: Batches
    prior: Batches

    def __post_init__(self):
        both = self.instance, self.prior
        a, b = ({k: np.shape(v) for k, v in batches[0].items()} for batches in both)
        if a != b or any(len(batches.sizes) > 1 for batches in both):
            raise ValueError(
                f"Batches of the subject and of its class must be alike, without buckets; got {a} and {b}."
            )

    @property
    def num_examples(self) -> int:
        """Examples of the subject."""
        return self.instance.num_examples

    @property
    def faults(self) -> tuple[Fault, ...]:
        return self.instance.faults + self.prior.faults

    @property
    def signature(self) -> dict[str, int]:
        of_prior = {f"prior_{k}": v for k, v in self.prior.signature.items()}
        return self.instance.signature | of_prior

    def __getitem__(self, n: int) -> Batch:
        return self.make(n).batch

    def make(self, n: int) -> Made:
        """As of `Batches`."""
        (a, wrong), (b, wrong_too) = self.instance.make(n), self.prior.make(n)
        return Made(joined([a, b]), wrong + wrong_too)


@dataclasses.dataclass(frozen=True)
class Listed:
    """Rows in memory as a source: a list of dictionaries that share their keys."""

    table: Sequence[Mapping[str, Any]]
    faults: tuple[Fault, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.table[0]) if self.table else ()

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        return f"row {i}"

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self.table[i]


def share(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """The rows of a batch that are a process's: the first, and the one after the last.

    Raises:
      ValueError: they do not divide.

    >>> share(8, 1, 4)
    (2, 4)
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} of process_count={process_count}: count from 0.")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} does not divide among {process_count} processes; use a multiple.")
    each = batch_size // process_count
    return process_index * each, (process_index + 1) * each


def collate(examples: Iterable[Mapping[str, Any]]) -> Batch:
    """Examples as one batch: arrays side by side, captions in lists.

    >>> collate([{"image": np.zeros(3), "caption": "a"}, {"image": np.ones(3), "caption": "b"}])["caption"]
    ['a', 'b']
    """
    examples = list(examples)
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {name: cells if isinstance(cells[0], str) else np.stack(cells) for name, cells in columns.items()}


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches one after the other.

    >>> joined([{"index": np.arange(2), "caption": ["a", "b"]}, {"index": np.arange(1), "caption": ["c"]}])
    {'index': array([0, 1, 0]), 'caption': ['a', 'b', 'c']}
    """
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    together = lambda cells: sum(cells, []) if isinstance(cells[0], list) else np.concatenate(cells)
    return {name: together(cells) for name, cells in columns.items()}
