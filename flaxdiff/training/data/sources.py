"""Open a data set, whatever it is kept in."""

import os
from collections.abc import Sequence
from pathlib import Path

from flaxdiff.training.data.folder import Folder
from flaxdiff.training.data.protocol import Source
from flaxdiff.training.data.stored import MANIFEST, Precomputed
from flaxdiff.training.data.tables import Records, Rows, Streamed
from flaxdiff.training.data.tars import Tars, expand


def open_source(
    where: str | os.PathLike[str],
    *,
    split: str = "train",
    images: Sequence[str] = ("image",),
    dataset_config_name: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    streaming: bool = False,
) -> Source | Streamed:
    """Open a data set, whatever it is kept in.

    Args:
      where: a folder (pictures, tar or parquet files, array records, what `datasets` or `precompute` saved), one such
        file or a pattern of them (`*`, `{000..099}`), "tfds:" and a name of tensorflow-datasets, or a name on the Hub.
      split: which part, where there are several.
      images: the columns that hold pictures.
      dataset_config_name: which configuration, where a name on the Hub has several.
      data_dir: where tensorflow-datasets keeps its data.
      streaming: read what `datasets` reads from the beginning on instead of by number.

    Raises:
      ValueError: nothing there, or nothing that can be used.
      ImportError: a library that it needs is not installed.
    """
    name = os.fspath(where)
    if name.startswith("tfds:"):
        return Rows.of_tfds(name.removeprefix("tfds:"), split, images, data_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path, split, images, streaming)
    if name.endswith((".tar", ".parquet")) or ".array_record" in path.name:
        return _of_files(expand(str(path)), split, streaming)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"{name} is no folder, and no .tar, .parquet or .array_record file; give one of these.")
    return Rows.of_datasets(name, split, streaming, name=dataset_config_name)


def _of_folder(path: Path, split: str, images: Sequence[str], streaming: bool) -> Source | Streamed:
    if (path / MANIFEST).is_file():
        return Precomputed.of(path)
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return Rows.saved(path, split, streaming)
    for pattern in ("*.tar", "*.parquet", "*.array_record*"):
        if files := sorted(path.rglob(pattern)):
            return _of_files(files, split, streaming)
    return Folder.of(path, images)


def _of_files(files: Sequence[Path], split: str, streaming: bool) -> Source | Streamed:
    """Files of one kind, told by the ending of the first."""
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ValueError(f"No such file: {', '.join(missing[:3])}.")
    if not files:
        raise ValueError("The pattern fits no file.")
    if files[0].suffix == ".tar":
        return Tars.of(files)
    if files[0].suffix == ".parquet":
        return Rows.of_datasets("parquet", split, streaming, data_files={split: list(map(str, files))})
    return Records.of(files)
