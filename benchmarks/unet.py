"""One step of Stable Diffusion 1.5's UNet, both branches of guidance: ours against PyTorch's diffusers.

    python benchmarks/unet.py --side 512 --repeat 3

Random weights, float32, the same cores. Each side runs in a process of its own, so that peak memory is its own too.
"""

import argparse
import json
import subprocess
import sys

import common

CONFIG = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}


def ours(side: int, repeat: int) -> float:
    import jax
    import jax.numpy as jnp

    import flaxdiff

    spec = flaxdiff.UNet2DConditionModel.from_config(CONFIG)
    params = jax.jit(lambda key: flaxdiff.init(spec, key))(jax.random.key(0))
    x, text = jnp.zeros((2, side // 8, side // 8, 4)), jnp.zeros((2, 77, 768))
    step = jax.jit(lambda params, x, text: flaxdiff.apply(spec, params, x, 500, text))
    return common.median(lambda: step(params, x, text).block_until_ready(), repeat)


def peer(side: int, repeat: int) -> float:
    import diffusers
    import torch

    model = diffusers.UNet2DConditionModel(**CONFIG).eval()
    x, text = torch.zeros(2, 4, side // 8, side // 8), torch.zeros(2, 77, 768)
    with torch.inference_mode():
        return common.median(lambda: model(x, 500, text), repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        seconds = {"ours": ours, "peer": peer}[args.only](args.side, args.repeat)
        print(json.dumps({"seconds": seconds, "peak_GB": common.peak_memory()}))
        return
    figures = {}
    for name in ("ours", "peer"):
        command = [sys.executable, __file__, "--side", str(args.side), "--repeat", str(args.repeat), "--only", name]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        figures |= {f"{name}_{key}": round(value, 3) for key, value in json.loads(line).items()}
    figures["speed_ratio"] = round(figures["peer_seconds"] / figures["ours_seconds"], 3)
    report = f"SD 1.5 UNet step, float32, batch 2, {args.side} x {args.side}"
    common.report(report, "jax", "flaxdiff-jax", "torch", "diffusers", **figures)


if __name__ == "__main__":
    main()
