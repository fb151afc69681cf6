"""WebDataset's tar files as a source with random access, without unpacking them.

Members that lie next to each other and have a name in common up to its first dot are one example: `12.jpg`, `12.txt`,
`12.edges.png` are the columns "jpg", "txt" and "edges.png". The first picture is the column "image" as well, the first
text is "text", and the fields of a `json` member are columns of their own. Opening a file reads the headers of its
members once; an example then takes one read for each of its members.

Members are never written to disk. Only regular files count, of a size that fits what a picture may have; a file that
ends too early is used up to there.
"""

import dataclasses
import glob
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flaxdiff.images import LARGEST
from flaxdiff.training.data.faults import BadExample, Fault

IMAGES = ("jpg", "png", "jpeg", "webp")
TEXTS = ("text", "txt", "caption")


class Member(NamedTuple):
    """Where the bytes of a member lie."""

    offset: int
    size: int


class Group(NamedTuple):
    """The members of one example, by what follows the first dot."""

    path: Path
    key: str
    members: dict[str, Member]


@dataclasses.dataclass(frozen=True)
class Tars:
    """The examples of some tar files, in their order; see `of`.

    Attributes:
      groups: where the examples lie.
      columns: what an example may have.
      faults: members that cannot be used.
    """

    groups: tuple[Group, ...]
    columns: tuple[str, ...]
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Tars":
        """Look through tar files.

        Raises:
          ValueError: there is no example in them.
        """
        paths, faults = list(paths), []
        groups = tuple(group for path in paths for group in _groups(path, faults))
        if not groups:
            wrong = "".join(f"\n  {name}: {reason}" for name, reason in faults[:5])
            raise ValueError(
                f"{', '.join(map(str, paths[:3]))}: no example; give plain tar files of WebDataset.{wrong}"
            )
        columns = dict.fromkeys(extension for group in groups for extension in group.members)
        told = next((group for group in groups if "json" in group.members), groups[0])
        try:
            columns |= dict.fromkeys(_row(told))
        except BadExample:
            pass  # it will be reported when its turn comes
        columns |= {"image": None} if columns.keys() & set(IMAGES) else {}
        columns |= {"text": None} if columns.keys() & set(TEXTS) else {}
        return cls(groups, tuple(columns), tuple(faults))

    def __len__(self) -> int:
        return len(self.groups)

    def name(self, i: int) -> str:
        return f"{self.groups[i].path.name}:{self.groups[i].key}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        return _row(self.groups[i])


def expand(pattern: str) -> list[Path]:
    """The files of a pattern: `*` and `?` as in a shell, and numbers as in `{00000..00099}`.

    >>> [path.name for path in expand("cc-{08..11}.tar")]
    ['cc-08.tar', 'cc-09.tar', 'cc-10.tar', 'cc-11.tar']
    """
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = range(int(span[1]), int(span[2]) + 1)
        names = [f"{pattern[: span.start()]}{n:0{len(span[1])}}{pattern[span.end() :]}" for n in numbers]
        return [path for name in names for path in expand(name)]
    return [Path(name) for name in sorted(glob.glob(pattern))] if glob.has_magic(pattern) else [Path(pattern)]


def _groups(path: Path, faults: list[Fault]) -> Iterator[Group]:
    """The examples of one file; members that cannot be used go to `faults`."""
    group = None
    for member in _members(path, faults):
        head, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{head}/{stem}" if head else stem
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = Group(path, key, {})
        group.members[extension.lower()] = Member(member.offset_data, member.size)
    if group is not None:
        yield group


def _members(path: Path, faults: list[Fault]) -> Iterator[tarfile.TarInfo]:
    """The members that are regular files of a usable size and wholly there."""
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # it would keep them all
                hidden = member.name.rpartition("/")[2].startswith((".", "__"))
                if member.isdir() or hidden:
                    continue
                if not member.isreg() or member.issparse():
                    faults.append(Fault(f"{path.name}:{member.name[:80]}", "not a regular file"))
                elif member.size > LARGEST:
                    faults.append(Fault(f"{path.name}:{member.name[:80]}", f"larger than {LARGEST >> 20} MiB"))
                elif member.offset_data + member.size > end:
                    faults.append(Fault(f"{path.name}:{member.name[:80]}", "cut off at the end of its file"))
                else:
                    yield member
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        faults.append(Fault(path.name, f"not a plain tar file from some place on ({error})"))


def _row(group: Group) -> dict[str, Any]:
    """The columns of an example."""
    row: dict[str, Any] = {}
    try:
        with open(group.path, "rb") as file:
            for extension, (offset, size) in group.members.items():
                file.seek(offset)
                row[extension] = file.read(size)
    except OSError as error:
        raise BadExample("in a file that cannot be read") from error
    for extension in row.keys() & set(TEXTS):
        try:
            row[extension] = row[extension].decode().strip()
        except UnicodeDecodeError:
            raise BadExample("with a caption that cannot be read") from None
    for column, names in (("image", IMAGES), ("text", TEXTS)):
        if first := next((name for name in names if name in row), None):
            row[column] = row[first]
    if "json" in row:
        try:
            told = json.loads(row["json"])
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise BadExample("with JSON that is no object")
        row = {**told, **row}
    return row
