"""The package as a whole: what importing it costs, its public names, its command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import flaxdiff
from flaxdiff import cli, registry, schedulers


def test_import_is_light():
    """Neither transformers nor torch, nor any model, is imported before it is used."""
    heavy = ("torch", "transformers", "flax", "optax")
    code = f"import sys, flaxdiff; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_sampling_does_not_import_torch():
    code = (
        "import sys, flaxdiff; pipe, params = flaxdiff.load(); pipe.prepare_inputs(prompt='cat');"
        "print([m for m in ('torch', 'diffusers', 'tensorflow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_public_names():
    """Every name of the lazy face is there, and says what it is."""
    for name in dir(flaxdiff):
        assert getattr(flaxdiff, name) is not None
    assert set(registry.names("scheduler")) == set(schedulers.SCHEDULERS)
    with pytest.raises(AttributeError, match="flaxdiff has no 'FluxPipelin'"):
        _ = flaxdiff.FluxPipelin


def test_command(tmp_path, capsys):
    target = tmp_path / "dog.png"
    arguments = [
        "--steps",
        "2",
        "--num",
        "2",
        "--seed",
        "3",
        "--scheduler",
        "EulerDiscreteScheduler",
        "--guidance",
        "2",
    ]
    assert cli.main(["sample", "dog face on blue", "-o", str(target), *arguments]) == 0
    assert Image.open(target).size == (128, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["dog.png"]
    assert capsys.readouterr().out.strip() == str(target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "dog"], "no ending that names a kind of picture"),
        (["-o", "nowhere/dog.png"], "nowhere is not a folder"),
        (["--num", "0"], "ask for at least one"),
        (["--steps", "0"], "num_inference_steps=0"),
        (["--scheduler", "EulerDiscretScheduler"], "did you mean EulerDiscreteScheduler"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_command_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "cat", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_table_of_coverage_is_of_today():
    """It has every class, and the tests that it names are there."""
    page = (Path(__file__).parent.parent / "docs" / "coverage.md").read_text()
    sorts = ("pipeline", "model", "scheduler", "flax")
    remedy = "run pytest -n 2 --junitxml=results.xml && python docs/coverage.py results.xml"
    assert sorted(re.findall(r"^\| `(\w+)`", page, re.M)) == sorted(n for s in sorts for n in registry.names(s)), remedy
    for file, test in set(re.findall(r"`(\w+\.py)::(\w+)`", page)):
        assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(), re.M), (
            f"{file}::{test}: {remedy}"
        )
