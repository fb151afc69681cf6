"""Every notebook runs from top to bottom, on eight devices, and says what its committed outputs say."""

import copy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
LARGEST = 1_000_000  # bytes of a notebook with its pictures


def results(notebook) -> list[list[str]]:
    """The value that each cell ends in, as text; what a cell prints, such as seconds, may differ."""
    of = lambda cell: [output for output in cell.get("outputs", []) if output.output_type == "execute_result"]
    return [[output.data["text/plain"] for output in of(cell)] for cell in notebook.cells]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))  # this flaxdiff, not an installed one
    committed = nbformat.read(path, as_version=4)
    notebook = copy.deepcopy(committed)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert results(notebook) == results(committed), "run the notebook again and commit what it says"
    assert path.stat().st_size < LARGEST
