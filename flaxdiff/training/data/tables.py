"""Tables as sources: data sets of `datasets` and of tensorflow-datasets, and array records.

Pictures stay encoded until an example is made: decoding is a worker's task, and damage a single example's fault.
"""

import contextlib
import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxdiff.pipelines.spiece import fields
from flaxdiff.training.data.faults import BadExample, Fault
from flaxdiff.training.data.folder import inside
from flaxdiff.training.data.protocol import needed


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table with random access: a data set of `datasets` or of tensorflow-datasets.

    Attributes:
      table: `table[i]` is a dictionary.
      title: what it is called.
      columns, faults: as of `Source`.
    """

    table: Any
    title: str
    columns: tuple[str, ...]
    faults: tuple[Fault, ...] = ()

    @classmethod
    def of_datasets(cls, path: str, split: str, streaming: bool, **options: Any) -> "Rows | Streamed":
        """A data set of the Hub, or of files that `datasets` can read."""
        datasets = needed("datasets")
        try:
            table = datasets.load_dataset(path, split=split, streaming=streaming, **options)
        except Exception as error:  # what a format's builder or a network may raise has no common class
            raise ValueError(
                f"{path!r} is no folder here, and as a data set of the Hub it cannot be had "
                f"({type(error).__name__}: {error}); check the name, the split {split!r} and the network."
            ) from error
        return cls._of_table(table, path, streaming)

    @classmethod
    def saved(cls, path: Path, split: str, streaming: bool) -> "Rows | Streamed":
        """What `save_to_disk` of `datasets` wrote."""
        datasets = needed("datasets")
        table = datasets.load_from_disk(str(path))
        if isinstance(table, Mapping):
            if split not in table:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(table)}.")
            table = table[split]
        return cls._of_table(table.to_iterable_dataset() if streaming else table, path.name, streaming)

    @classmethod
    def _of_table(cls, table: Any, title: str, streaming: bool) -> "Rows | Streamed":
        datasets = needed("datasets")
        for column, feature in (table.features or {}).items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        if streaming:
            columns = table.column_names or list(next(iter(table), {}))
            return Streamed(table, title, tuple(columns))
        if not len(table):
            raise ValueError(f"{title} has no rows.")
        return cls(table, title, tuple(table.column_names))

    @classmethod
    def of_tfds(cls, name: str, split: str, images: Sequence[str], data_dir: Any) -> "Rows":
        """A data set that tensorflow-datasets has prepared as array records, which takes no TensorFlow to read."""
        tfds = needed("tensorflow_datasets")
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
            skip = {column: tfds.decode.SkipDecoding() for column in images if column in builder.info.features}
            table = builder.as_data_source(split=split, decoders=skip)
        except Exception as error:  # what a data set's own builder may raise has no common class
            raise ValueError(
                f"tensorflow-datasets cannot give {name!r}, split {split!r} ({type(error).__name__}: {error})."
            ) from error
        return cls(table, name, tuple(builder.info.features))

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        return f"{self.title}[{i}]"

    def __getitem__(self, i: int) -> dict[str, Any]:
        with _reading("a row"):
            row = self.table[int(i)]
        return cells(row)


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """A file that turns out to be damaged or gone makes a bad example, and no more."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # pyarrow's and array_record's errors are among these
        raise BadExample(f"{what} that cannot be read") from error


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with pictures as bytes or files."""
    return {column: _cell(value) for column, value in row.items()}


def _cell(value: Any) -> Any:
    """A cell of `datasets`: of a picture the bytes, or the file where those were downloaded apart."""
    if not (isinstance(value, dict) and value.keys() == {"bytes", "path"}):
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    path = str(value["path"])
    if path.startswith("hf://"):
        with _reading("a file"), needed("fsspec").open(path, "rb") as file:
            return file.read()
    root = Path(needed("datasets").config.HF_CACHE_HOME).expanduser()  # where `datasets` and the Hub keep downloads
    if not Path(path).is_relative_to(root):
        raise BadExample("outside of the folder")
    return inside(root, Path(path).relative_to(root).as_posix())


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A table that is read from the beginning on.

    Attributes:
      table: an iterable data set of `datasets`.
      title, columns, faults: as of `Rows`.
      buffer_size: among how many rows one is drawn.
    """

    table: Any
    title: str
    columns: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    buffer_size: int = 1000

    def rows(self, seed: int | None, epoch: int, process_index: int, process_count: int) -> Iterator[dict[str, Any]]:
        """The rows of one epoch that are a process's, in an order that these numbers determine; still encoded."""
        table = self.table
        if seed is not None:
            table = table.shuffle(seed=seed, buffer_size=self.buffer_size)
            table.set_epoch(epoch)
        if process_count > 1:
            split = needed("datasets.distributed").split_dataset_by_node
            table = split(table, process_index, process_count)
        return iter(table)


@dataclasses.dataclass(frozen=True)
class Records:
    """Array records that hold `tf.train.Example`s, see `of`."""

    records: Any
    title: str
    columns: tuple[str, ...]
    faults: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, files: Sequence[Path]) -> "Records":
        """Open files of array records.

        Raises:
          ValueError: they cannot be read, or hold no example.
        """
        sources = needed("grain").sources
        title = ", ".join(map(str, files[:2]))
        try:
            records = sources.ArrayRecordDataSource(list(map(str, files)))
            first = parse_example(records[0]) if len(records) else {}
        except (BadExample, RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{title}: no array records of tf.train.Example ({error}); write them again.") from error
        if not first:
            raise ValueError(f"{title} has no records.")
        return cls(records, files[0].name, tuple(first))

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        return f"{self.title}[{i}]"

    def __getitem__(self, i: int) -> dict[str, Any]:
        with _reading("a record"):
            record = self.records[int(i)]
        return parse_example(record)


def parse_example(record: bytes) -> dict[str, Any]:
    """The features of a serialised `tf.train.Example`: bytes, reals or whole numbers; a list of one as what is in it.

    Raises:
      BadExample: it is none.

    >>> parse_example(bytes([10, 12, 10, 10, 10, 1, 110, 18, 5, 26, 3, 10, 1, 7]))
    {'n': 7}
    """
    found: dict[str, Any] = {}
    try:
        for _, features in fields(record):
            for _, entry in fields(features):
                pair = dict(fields(entry))
                lists = [(kind, value) for kind, body in fields(pair.get(2, b"")) for _, value in fields(body)]
                values = [one for kind, value in lists for one in VALUES[kind](value)]
                found[pair[1].decode()] = values[0] if len(values) == 1 else values
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise BadExample("not a tf.train.Example") from error
    return found


def _reals(packed: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(packed) // 4}f", packed)


def _wholes(packed: int | bytes) -> list[int]:
    """Numbers of 64 bits with a sign, of one field or packed: seven bits a byte, the lowest first."""
    values, value, shift = [packed] if isinstance(packed, int) else [], 0, 0
    for byte in packed if isinstance(packed, bytes) else b"":
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            values, value, shift = [*values, value], 0, 0
    return [value - (1 << 64) if value >> 63 else value for value in values]


VALUES = {1: lambda value: [bytes(value)], 2: _reals, 3: _wholes}  # the kinds of lists in a feature
