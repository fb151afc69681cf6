"""One step of Stable Diffusion 1.5's UNet, both branches of guidance: ours against PyTorch's diffusers.

    python benchmarks/unet.py --side 512

Random weights, float32, the same cores; both sides load the same folder.
"""

import argparse
import os

import common


def ours(args: argparse.Namespace) -> common.Figures:
    os.environ |= common.CPU
    import jax
    import jax.numpy as jnp

    import flaxdiff
    from flaxdiff import memory

    folder = common.checkpoint("sd15", args.tiny)
    spec, params = flaxdiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    x, text = jnp.zeros((2, args.side // 8, args.side // 8, 4)), jnp.zeros((2, 77, spec.config.cross_attention_dim))
    step = jax.jit(lambda params, x, text: flaxdiff.apply(spec, params, x, 500, text)).lower(params, x, text).compile()
    memory.returned()
    seconds = common.median(lambda: step(params, x, text).block_until_ready(), args.repeat)
    return {"time of a step, s": seconds, "peak memory, GB": common.peak_memory()}


def peer(args: argparse.Namespace) -> common.Figures:
    import diffusers
    import torch

    folder = common.checkpoint("sd15", args.tiny)
    model = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    x = torch.zeros(2, 4, args.side // 8, args.side // 8)
    text = torch.zeros(2, 77, model.config.cross_attention_dim)
    with torch.inference_mode():
        seconds = common.median(lambda: model(x, 500, text), args.repeat)
    return {"time of a step, s": seconds, "peak memory, GB": common.peak_memory()}


if __name__ == "__main__":
    parser = common.arguments(__doc__, side=512)
    common.compare("SD 1.5 UNet, float32, batch 2, {side} x {side}", parser, in_turn=True, ours=ours, peer=peer)
