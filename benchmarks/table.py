"""Write the table in benchmarks/README.md from the lines in benchmarks/results/.

    python benchmarks/table.py

`RUNS` lists what the table shows. A run without a line in results/ (scripts add theirs with `--keep`) is said to be not
yet measured; of several, the last counts.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPEEDUPS = {  # model -> what saves work in it, and how strongly
    "emoji": {"deep_cache": "3", "branch_cache": "3", "tgate": "12", "token_merging": "0.5"},
    "emoji-flow": {
        "first_block": "0.1",
        "tea_cache": "0.25",
        "mag_cache": "0.1",
        "taylor_seer": "3",
        "pyramid_attention_broadcast": "2",
    },
}
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
RUNS = (  # (what is measured, the command)
    ("SD 1.5 UNet, float32, batch 2, 256 x 256", "unet.py --side 256"),
    ("SD 1.5 UNet, float32, batch 2, 512 x 512", "unet.py --side 512"),
    ("SD 1.5 UNet, an update, float32, batch 2, 256 x 256", "training.py"),
    ("SD 1.5, whole pipeline, float32, 4 steps, 256 x 256", "pipeline.py --side 256 --steps 4"),
    ("SD 1.5, whole pipeline, float32, 4 steps, 512 x 512", "pipeline.py --side 512 --steps 4 --repeat 1"),
    (
        "The tutorial's ladder without half precision, SD 1.5, 256 x 256",
        "ladder.py --side 256 --steps 10 --fewer 4 --batch 8 --float32 --repeat 1",
    ),
    ("The tutorial's ladder, SD 1.5, 512 x 512", "ladder.py --side 512 --steps 50 --fewer 20 --batch 8"),
    ("Importing, and the first use of StableDiffusionPipeline", "imports.py"),
    *(
        (
            f"{model}, 24 steps, {name} {strength} against none",
            f"speedups.py --model {model} --name {name} --strength {strength}",
        )
        for model, saving in SPEEDUPS.items()
        for name, strength in saving.items()
    ),
    ("SDXL UNet step, bfloat16, batch 2, 1024 x 1024, compiled for one v5e", "tpu.py"),
    ("SDXL UNet step, bfloat16, batch 2, 1024 x 1024, compiled for one v6e", "tpu.py --chip v6e"),
    ("FLUX.1 dev, a block of each kind and the ends, bfloat16, 1024 x 1024, compiled for one v6e", "flux.py"),
    (
        "FLUX.1 dev, the whole transformer, bfloat16, 1024 x 1024, compiled for one v6e",
        "flux.py --double 19 --single 38",
    ),
    *(
        (f"{model} on a GPU, bfloat16, 30 steps, batch {batch}, {side} x {side}", f"gpu.py {options}")
        for model, side in (("sdxl", 1024), ("sd15", 512))
        for batch in (1, 8)
        for options in [f"--model {model} --side {side} --steps 30 --batch {batch}"]
    ),
)


def rows(claim: str, command: str, records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The rows of one run: a figure each.

    >>> next(rows("a step", "unet.py", []))
    '| a step | `unet.py` | | | not yet measured | |'
    """
    found = [r for r in records if r["command"].removeprefix("python benchmarks/").split() == command.split()]
    if not found:
        yield f"| {claim} | `{command}` | | | not yet measured | |"
        return
    last = found[-1]
    ours, peer = last["ours"], last["peer"]
    for what in dict.fromkeys([*ours, *peer]):
        a, b = ours.get(what), peer.get(what)
        ratio = f"{b / a:.2f}" if a and b else ""
        show = lambda value: "" if value is None else f"{value:,.4g}"
        yield f"| {claim} | {what} | {show(a)} | {show(b)} | {ratio} | {last['date']}, {last['machine']} |"
        claim = ""


def table(folder: Path) -> str:
    """The whole table, from the lines in a folder."""
    paths = sorted(folder.glob("*.jsonl"))
    records = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    head = ["| what | figure | ours | peer | peer over ours | measured |", "|---|---|--:|--:|--:|---|"]
    return "\n".join([*head, *(row for claim, command in RUNS for row in rows(claim, command, records))]) + "\n"


def main() -> None:
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(before + BEGIN + table(HERE / "results") + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
