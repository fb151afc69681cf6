"""A folder of pictures as a source of examples, with captions where it has them.

    folder/metadata.jsonl    {"file_name": "a.png", "text": "a cat", "conditioning_image": "a.edges.png"}, one a line
    folder/b.png  b.txt      or the caption beside each picture
    folder/c.png             or pictures alone

Lines of `metadata.jsonl` name files relative to where it lies, in the folder or one below, and never outside of that.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flaxdiff.training.data.faults import BadExample, Fault
from flaxdiff.training.data.pictures import SUFFIXES

LONGEST = 1 << 20  # bytes of a caption: more is none


@dataclasses.dataclass(frozen=True)
class Folder:
    """The pictures of a folder and of those in it, in the order of their names; see `of`.

    Attributes:
      root: the folder.
      columns: what an example may have.
      rows: name of the example, and its cells: files are paths.
      faults: what is named there and cannot be used.
    """

    root: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, Any]], ...]
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, root: Path, images: Sequence[str] = ("image",)) -> "Folder":
        """Look through a folder.

        Args:
          root: the folder.
          images: the columns of `metadata.jsonl` that name files; its `file_name` is the column "image".

        Raises:
          ValueError: there is no picture in it.
        """
        tables = sorted(root.rglob("metadata.jsonl"))
        faults: list[Fault] = []
        found = _listed(root, tables, images, faults) if tables else _beside(root)
        rows = tuple(sorted(found, key=lambda row: row[0]))
        if not rows:
            wrong = "".join(f"\n  {name}: {reason}" for name, reason in faults[:5])
            named = f"{tables[0]} names no picture that is there" if tables else f"{root} holds no picture"
            raise ValueError(f"{named}; give a folder of {', '.join(SUFFIXES)} files, or a metadata.jsonl.{wrong}")
        return cls(root, tuple(dict.fromkeys(column for _, row in rows for column in row)), rows, tuple(faults))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.rows[i][0]

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i][1]
        text = row.get("text")
        return {**row, "text": _read(text)} if isinstance(text, Path) else row


def inside(root: Path, name: Any) -> Path:
    """The file of a name in a folder.

    Raises:
      BadExample: no name, one that leads out of the folder, or no such file.
    """
    if not isinstance(name, str) or not name:
        raise BadExample("without a file name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise BadExample("outside of the folder")
    try:
        there = (root / path).is_file()
    except OSError:  # e.g. a name longer than a name can be
        there = False
    if not there:
        raise BadExample("a missing file")
    return root / path


def _listed(
    root: Path, tables: Sequence[Path], images: Sequence[str], faults: list[Fault]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the lines of metadata.jsonl say; those that cannot be used go to `faults`."""
    for table in tables:
        with open(table, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                name = f"{table.relative_to(root).as_posix()} line {number}"
                try:
                    row = _object(line)
                    row["image"] = row.pop("file_name", None)
                    name = f"{name} ({str(row['image'])[:80]})"
                    files = {column: inside(table.parent, row[column]) for column in images if column in row}
                    yield files["image"].relative_to(root).as_posix() if "image" in files else name, {**row, **files}
                except BadExample as error:
                    faults.append(Fault(name, str(error)))


def _object(line: bytes) -> dict[str, Any]:
    """A line of JSON that is an object. Raises BadExample where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise BadExample("a line that is no JSON object")
    return row


def _beside(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pictures of a folder, each with the text of the same name where there is one."""
    files = [p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    for path in files:
        relative = path.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        text = path.with_suffix(".txt")
        yield relative.as_posix(), {"image": path, **({"text": text} if text.is_file() else {})}


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(LONGEST).decode().strip()
    except (OSError, ValueError):
        raise BadExample("with a caption that cannot be read") from None
