"""The benchmarks run, at a size of no use, and the table is made of what they print."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = ("--tiny", "--repeat", "1")


@pytest.fixture
def sides(monkeypatch, capsys):
    """The figures of each side of a script, at a size of no use, as the script's own processes print them."""

    def run(script: str, *options: str) -> dict[str, dict[str, float]]:
        monkeypatch.syspath_prepend(FOLDER)
        figures = {}
        for side in ("ours", "peer"):
            monkeypatch.setattr(sys, "argv", [script, *TINY, *options, "--only", side])
            with jax.numpy_dtype_promotion("standard"):
                runpy.run_path(str(FOLDER / script), run_name="__main__")
            figures[side] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return figures

    return run


@pytest.mark.slow
def test_one_line():
    """Each side runs in a process of its own; the line says what was run, where and with what."""
    command = [sys.executable, str(FOLDER / "unet.py"), *TINY, "--side", "32"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ran.returncode == 0, ran.stderr
    (line,) = map(json.loads, ran.stdout.splitlines())
    assert all(line[side]["time of a step, s"] > 0 for side in ("ours", "peer"))
    assert line["claim"] == "SD 1.5 UNet, float32, batch 2, 32 x 32"
    assert line["command"] == "python benchmarks/unet.py --tiny --repeat 1 --side 32"
    assert line["versions"]["jax"] and line["date"] and line["machine"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [("deep_cache", "2"), ("token_merging", "0.5")])
def test_speedups(options, sides):
    """The difference is ours alone; there is one."""
    figures = sides("speedups.py", "--name", options[0], "--strength", options[1])
    assert set(figures["peer"]) == {"time of a picture, s"} and 0 < figures["ours"]["difference"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "figures"),
    [
        ("training.py", ["--side", "32"], {"time of an update, s", "peak memory, GB"}),
        ("pipeline.py", ["--side", "16", "--steps", "2"], {"time of a picture, s", "peak memory, GB"}),
        ("gpu.py", ["--side", "16", "--steps", "2", "--batch", "2"], {"time of a picture, s", "peak memory, GB"}),
        ("imports.py", [], {"import, s", "import and first use, s", "peak memory, GB"}),
        (
            "ladder.py",
            ["--side", "16", "--steps", "3", "--fewer", "2", "--batch", "2"],
            {
                "float32, 3 steps, s a picture",
                "half precision, s a picture",
                "DPM-Solver++ in 2 steps, s a picture",
                "batch of 2, s a picture",
            },
        ),
    ],
)
def test_scripts(script, options, figures, sides):
    found = sides(script, *options)
    assert set(found["ours"]) == set(found["peer"]) == figures
    assert all(value > 0 for side in found.values() for value in side.values())


@pytest.mark.slow
@pytest.mark.parametrize("script, chip", [("tpu.py", "v5e"), ("flux.py", "v6e")])
def test_tpu(script, chip, sides):
    pytest.importorskip("libtpu")
    figures = sides(script, "--chip", chip)
    assert figures["ours"]["arithmetic, TFLOP"] > 0 and figures["peer"] == {}


def test_without_a_gpu():
    """A run that would mean nothing is refused in one line."""
    command = [sys.executable, str(FOLDER / "gpu.py")]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ran.returncode != 0 and "JAX finds no GPU" in ran.stderr and not ran.stdout


def test_table(table, tmp_path):
    """The last line of a run counts; a ratio is the peer's figure over ours; what was not run says so."""
    line = {"claim": "", "command": "python benchmarks/unet.py --side 256", "date": "2026-11-21", "machine": "m"}
    figures = [({"s": 1.0}, {"s": 4.0}), ({"s": 2.0, "ours alone": 0.5}, {"s": 3.0, "cited": 7})]
    text = "".join(json.dumps(line | {"ours": a, "peer": b}) + "\n" for a, b in figures)
    (tmp_path / "unet.jsonl").write_text(text)
    made = table.table(tmp_path).splitlines()
    first = next(i for i, row in enumerate(made) if row.startswith("| SD 1.5 UNet, float32, batch 2, 256"))
    assert made[first].endswith("| s | 2 | 3 | 1.50 | 2026-11-21, m |")
    assert made[first + 1 : first + 3] == [
        "|  | ours alone | 0.5 |  |  | 2026-11-21, m |",
        "|  | cited |  | 7 |  | 2026-11-21, m |",
    ]
    assert made[first + 3].count("not yet measured") == 1
    assert len({row.count("|") for row in made}) == 1


def test_the_table_is_up_to_date(table):
    """README.md holds what the lines in results/ make, and every command in it is one that the scripts take."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert table.table(FOLDER / "results") == text.split(table.BEGIN)[1].split(table.END)[0]
    for _, command in table.RUNS:
        assert (FOLDER / command.split()[0]).is_file()
