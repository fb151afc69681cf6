"""Stable Diffusion 1.5 from prompt to picture (text encoder, UNet, autoencoder): ours against PyTorch's diffusers.

    python benchmarks/pipeline.py --side 512 --steps 4

Random weights, float32, the same cores, as many steps as are said: nothing is extrapolated. Both sides load the same
folder.
"""

import argparse
import os

import common


def ours(args: argparse.Namespace) -> common.Figures:
    os.environ |= common.CPU
    import jax

    import flaxdiff

    folder, size = common.checkpoint("sd15", args.tiny), dict(height=args.side, width=args.side)
    pipe, params = flaxdiff.load(folder, compile=size)
    pipe, key = pipe.replace(progress=False), jax.random.key(0)
    options = size | dict(num_inference_steps=args.steps, output_type="np")
    seconds = common.median(lambda: pipe(params, key, prompt=common.PROMPT, **options), args.repeat)
    return {"time of a picture, s": seconds, "peak memory, GB": common.peak_memory()}


def peer(args: argparse.Namespace) -> common.Figures:
    import diffusers

    folder = common.checkpoint("sd15", args.tiny)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    options = dict(height=args.side, width=args.side, num_inference_steps=args.steps, output_type="np")
    seconds = common.median(lambda: pipe(common.PROMPT, **options), args.repeat)
    return {"time of a picture, s": seconds, "peak memory, GB": common.peak_memory()}


if __name__ == "__main__":
    parser = common.arguments(__doc__, side=512, steps=4)
    claim = "SD 1.5, whole pipeline, float32, {steps} steps, {side} x {side}"
    common.compare(claim, parser, in_turn=True, ours=ours, peer=peer)
