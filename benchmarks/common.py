"""What the benchmarks share: one claim a script, ours and the peer's each in a process of its own, one JSON line.

A script has two functions, `ours` and `peer`, from its arguments to figures (what -> number), and hands them to
`compare`. Where both need weights they load the same folder, made once with random numbers by `checkpoint`.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROMPT = "portrait photo of an old warrior chief"
PACKAGES = ("jax", "libtpu", "flaxdiff-jax", "torch", "diffusers", "transformers")
TURNS = "FLAXDIFF_BENCHMARK_TURNS"  # set for a side that waits to be told before what it times
TURN = "your turn\n"
Figures = dict[str, float]
# What ours runs under where a CPU is meant: nothing is loaded for a TPU, and work in an order that keeps little, see
# docs/memory.md.
CPU = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
TINY: dict[str, dict[str, Any]] = {  # component -> what makes it small; networks that fit each other
    "vae": dict(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    ),
    "text_encoder": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    "text_encoder_2": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32
    ),
    "unet": dict(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        transformer_layers_per_block=1,
        sample_size=8,
    ),
}


def median(run: Callable[[], Any], repeat: int, warm_up: int = 1) -> float:
    """The median of so many timed calls, in seconds; `run` returns when the work is done."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeat):
        turn()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def turn(first: bool = False) -> None:
    """Let the other side go on, and wait to be told to; a side that runs by itself does not wait."""
    if TURNS in os.environ:
        print(end="" if first else TURN, flush=True)
        if not sys.stdin.readline():
            sys.exit("benchmarks: who gives the turns has gone.")


def peak_memory() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# --- the same random weights for both ---------------------------------------------------------------------------------


def checkpoint(model: str, tiny: bool = False, dtype: str = "float32") -> Path:
    """A folder with "sd15" or "sdxl" in diffusers' layout and random weights, kept in the temporary directory.

    Another process makes it, so that what that takes is nobody's memory here.
    """
    folder = Path(tempfile.gettempdir()) / "flaxdiff-benchmarks" / f"{model}{'-tiny' if tiny else ''}-{dtype}"
    if not folder.exists():
        code = f"import common; common.make({model!r}, {tiny}, {dtype!r}, {str(folder)!r})"
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, env=environment)
    return folder


def make(model: str, tiny: bool, dtype: str, folder: str) -> None:
    """Write such a folder."""
    import numpy as np

    import flaxdiff
    from flaxdiff.pipelines.text import Tokenizer
    from flaxdiff.planning.plan import pipeline
    from flaxdiff.schedulers import EulerDiscreteScheduler, PNDMScheduler

    pipe = pipeline(model)
    if tiny:
        pipe = pipe.replace(**{name: spec.replace(**TINY[name]) for name, spec in pipe.specs})
        wide = sum(spec.config.hidden_size for name, spec in pipe.specs if name.startswith("text_encoder"))
        pooled = {"projection_class_embeddings_input_dim": 32 + 6 * 256} if model == "sdxl" else {}
        pipe = pipe.replace(unet=pipe.unet.replace(cross_attention_dim=wide, **pooled))
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = (
        PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False)
        if model == "sd15"
        else EulerDiscreteScheduler(**betas, timestep_spacing="leading")
    )

    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        shape = leaf.shape[1:] if leaf.stack else leaf.shape
        if len(shape) == 1:
            return np.broadcast_to(np.float32(leaf.kind == "norm"), leaf.shape)
        scale = np.float32(1 / np.sqrt(np.prod(shape[:-1])))
        return rng.standard_normal(leaf.shape, np.float32) * scale

    params = {name: {k: draw(leaf) for k, leaf in flaxdiff.layout(spec).items()} for name, spec in pipe.specs}
    with tempfile.TemporaryDirectory() as words:
        tokenizer(Path(words))
        reader = Tokenizer(words, "CLIPTokenizer")
        pipe = pipe.replace(scheduler=scheduler, **{name: reader for name, _ in pipe.tokenizers})
        flaxdiff.save(folder, pipe, params, dtype=dtype)


def tokenizer(folder: Path) -> None:
    """The shipped model's tokenizer at the length of Stable Diffusion's."""
    import flaxdiff

    for path in (flaxdiff.EMOJI / "tokenizer").iterdir():
        (folder / path.name).write_text(path.read_text().replace('"model_max_length": 32', '"model_max_length": 77'))


# --- running ----------------------------------------------------------------------------------------------------------


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The parser of a script: these options with their defaults, and those that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--repeat", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to see that the script works")
    parser.add_argument("--keep", action="store_true", help="append the line to results/, where table.py finds it")
    parser.add_argument("--only", choices=["ours", "peer"], help=argparse.SUPPRESS)
    return parser


def compare(
    claim: str,
    parser: argparse.ArgumentParser,
    in_turn: bool = False,
    **sides: Callable[[argparse.Namespace], Figures],
) -> None:
    """Run each side in a process of its own, and print one line with the figures of both.

    `in_turn`: both at once, but never two working: one goes on to its next timed run, then the other. So what else a
    machine does from minute to minute slows both. It needs room for both.
    """
    args = parser.parse_args()
    claim = claim.format_map(vars(args))
    if args.only:
        turn(first=True)
        print(json.dumps(sides[args.only](args)))
        return
    figures = {}
    for together in [list(sides)] if in_turn else [[name] for name in sides]:
        processes = {name: started(name) for name in together}
        while left := [name for name in together if name not in figures]:
            for name in left:
                line = gone_on(processes[name])
                if not line or line != TURN and processes[name].wait():
                    sys.exit(f"{Path(sys.argv[0]).name}: {name} failed, see above.")
                if line != TURN:
                    figures[name] = json.loads(line)
    line = record(claim, figures)
    print(line)
    if args.keep:
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / f"{Path(sys.argv[0]).stem}.jsonl", "a", encoding="utf-8") as f:
            f.write(line + "\n")


def started(side: str) -> subprocess.Popen:
    """One side of this script, waiting for its first turn."""
    command, environment = [sys.executable, *sys.argv, "--only", side], os.environ | {TURNS: "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def gone_on(process: subprocess.Popen) -> str:
    """What a side says when it has had its turn: that it waits for the next, or its figures; nothing if it failed."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
    return next((line for line in process.stdout if line == TURN or line.startswith("{")), "")


def record(claim: str, figures: Mapping[str, Figures]) -> str:
    """One line: what was measured, by which command, when, on what, with which versions."""
    command = [f"benchmarks/{Path(sys.argv[0]).name}", *(word for word in sys.argv[1:] if word != "--keep")]
    rounded = {side: {what: float(f"{value:.4g}") for what, value in found.items()} for side, found in figures.items()}
    line = {
        "claim": claim,
        "command": " ".join(["python", *command]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **rounded,
    }
    return json.dumps(line, ensure_ascii=False)


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, where they are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine() -> str:
    """The accelerator, if there is one; else the kind of processor and how many cores this process may use."""
    found = subprocess.run(
        ["sh", "-c", "nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    return found or f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
