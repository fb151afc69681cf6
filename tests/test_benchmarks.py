"""The benchmarks run, at a size of no use, and the table is made of what they print."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: str, *options: str) -> dict:
    """The line that a script prints, at a size of no use."""
    command = [sys.executable, str(FOLDER / script), "--tiny", "--repeat", "1", *options]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [("deep_cache", "2"), ("token_merging", "0.5")])
def test_speedups(options):
    """The difference is ours alone; there is one."""
    line = run("speedups.py", "--name", options[0], "--strength", options[1])
    assert set(line["peer"]) == {"time of a picture, s"} and 0 < line["ours"]["difference"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "figures"),
    [
        ("unet.py", ["--side", "32"], {"time of a step, s", "peak memory, GB"}),
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
def test_scripts(script, options, figures):
    line = run(script, *options)
    assert set(line["ours"]) == set(line["peer"]) == figures
    assert all(value > 0 for side in ("ours", "peer") for value in line[side].values())
    assert line["command"] == f"python benchmarks/{script} --tiny --repeat 1 {' '.join(options)}".strip()
    assert line["versions"]["jax"] and line["date"] and line["machine"]
    assert "{" not in line["claim"]


@pytest.mark.slow
@pytest.mark.parametrize("script, chip", [("tpu.py", "v5e"), ("flux.py", "v6e")])
def test_tpu(script, chip):
    pytest.importorskip("libtpu")
    line = run(script, "--chip", chip)
    assert line["ours"]["arithmetic, TFLOP"] > 0 and line["peer"] == {}


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
