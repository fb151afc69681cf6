"""What it takes to import the package and to reach for a pipeline: time and memory, ours and PyTorch's diffusers.

    python benchmarks/imports.py --repeat 5

A process of its own for each run; files are in the page cache after the first. flaxdiff imports nothing before it is
used, so the first use of the pipeline's class, with all that it imports, counts too.
"""

import argparse
import json
import statistics
import subprocess
import sys

import common

CODE = """
import json, resource, time
seconds, start = {{}}, time.perf_counter()
import {package}
seconds["import, s"] = time.perf_counter() - start
{package}.StableDiffusionPipeline
seconds["import and first use, s"] = time.perf_counter() - start
seconds["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps(seconds))
"""


def measured(args: argparse.Namespace, package: str) -> common.Figures:
    run = [sys.executable, "-c", CODE.format(package=package)]
    runs = [json.loads(subprocess.run(run, check=True, capture_output=True).stdout) for _ in range(args.repeat + 1)]
    return {what: statistics.median(run[what] for run in runs[1:]) for what in runs[0]}


if __name__ == "__main__":
    common.compare(
        "Importing, and the first use of StableDiffusionPipeline",
        common.arguments(__doc__),
        ours=lambda args: measured(args, "flaxdiff"),
        peer=lambda args: measured(args, "diffusers"),
    )
