"""One step of SDXL on a TPU by the TPU compiler's own account, both branches of guidance; no TPU is needed.

    python benchmarks/tpu.py --chip v5e

1024 x 1024, bfloat16, compiled ahead of time for one chip (see docs/planning.md), blocks one after the other in place
of a loop and with little fast memory to each fused operation (see docs/cold_start.md). The peer's column is cited, not
measured in the same run: MaxDiffusion's UNet on its best kernel on a v5e, read from its compiled program in the same
way, at its commit 7cfb880; traced and compiled on 2026-12-01 in turn with ours on the same two cores. Cycles are the
compiler's estimate beside Pallas kernels, for which it has none.
"""

import argparse
import os
import time

import common

FLAGS = "--xla_tpu_scoped_vmem_limit_kib=6144"
PUBLISHED = {"cycles beside Pallas, M": 231, "arithmetic, TFLOP": 13.1, "temporary memory, GB": 0.41, "compile, s": 185}


def ours(args: argparse.Namespace) -> common.Figures:
    os.environ["LIBTPU_INIT_ARGS"] = FLAGS
    import flaxdiff
    from flaxdiff.planning.plan import pipeline

    start = time.perf_counter()
    model, side = ("emoji", 16) if args.tiny else ("sdxl", args.side)
    pipe = pipeline(model)
    pipe = pipe.replace(unet=pipe.unet.replace(scan_layers=False))
    report = flaxdiff.plan(pipe, f"{args.chip}:1x1", batch=1, height=side, width=side)
    step = next(part for part in report.parts if part.name == "step")
    kernels = step.cost.kernel_flops / step.cost.flops
    figures = {
        "cycles beside Pallas, M": step.cost.cycles / 1e6,
        "arithmetic, TFLOP": step.cost.flops / 1e12,
        "part of it in Pallas kernels": kernels,
        "traffic with HBM, GB": step.cost.bytes / 1e9,
        "temporary memory, GB": step.memory.temporary / 1e9,
        "compile, s": step.seconds,
        "the whole plan, s": time.perf_counter() - start,
    }
    return figures


def peer(args: argparse.Namespace) -> common.Figures:
    return PUBLISHED if args.chip == "v5e" and args.side == 1024 and not args.tiny else {}


if __name__ == "__main__":
    parser = common.arguments(__doc__, chip="v5e", side=1024)
    claim = "SDXL UNet step, bfloat16, batch 2, {side} x {side}, compiled for one {chip}"
    common.compare(claim, parser, ours=ours, peer=peer)
