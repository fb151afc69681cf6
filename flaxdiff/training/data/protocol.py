"""What a source of examples is, and the libraries that some of them need."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from flaxdiff.training.data.faults import Fault


class Source(Protocol):
    """Examples by number.

    Attributes:
      columns: what an example may have.
      faults: what was found to be of no use when the source was opened; not counted by `len`.
    """

    columns: tuple[str, ...]
    faults: tuple[Fault, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        """The cells of an example. Raises BadExample where it cannot be read."""

    def name(self, i: int) -> str:
        """What to call it in a report."""


def needed(module: str) -> Any:
    """A library that only training needs.

    Raises:
      ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This data needs {module.partition('.')[0]}, which cannot be imported ({error}); install it with "
            '`pip install ".[train]"` in the checkout.'
        ) from error


def check_columns(source: Any, columns: Iterable[str]) -> None:
    """Raise ValueError, which lists what there is, unless a source has these columns."""
    if missing := [column for column in columns if column not in source.columns]:
        raise ValueError(
            f"The data has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, source.columns))}. "
            "Say which to use by images=, texts= and numbers= of Examples, e.g. texts={'caption': 'text'}."
        )
