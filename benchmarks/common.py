"""What the benchmarks share: one claim a script, ours and the peer's in one run, one JSON line at the end."""

import datetime
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def median(run: Callable[[], Any], repeat: int, warm_up: int = 1) -> float:
    """The median of so many timed calls, in seconds; `run` returns when the work is done."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def report(claim: str, *packages: str, **figures: Any) -> None:
    """One line: what was measured, on what, with which versions."""
    where = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    versions = {package: version(package) for package in packages}
    line = {"claim": claim, "date": datetime.date.today().isoformat(), **where, **versions, **figures}
    print(json.dumps(line), flush=True)
