"""SDXL and SD 1.5 on a GPU: ours against PyTorch's diffusers at its fastest.

    python benchmarks/gpu.py --model sdxl --side 1024 --steps 30 --batch 1

bfloat16, random weights, prompt to pixels. The peer's networks are channels-last with fused projections and
scaled_dot_product_attention, compiled by torch.compile's longest search. Needs a GPU; `--tiny` runs on the CPU.
"""

import argparse
import sys

import common


def ours(args: argparse.Namespace) -> common.Figures:
    import jax
    import jax.numpy as jnp

    import flaxdiff

    device = jax.devices()[0]
    if device.platform != "gpu" and not args.tiny:
        sys.exit("JAX finds no GPU; install flaxdiff-jax[cuda] on a machine with one, or give --tiny.")
    folder = common.checkpoint(args.model, args.tiny, "bfloat16")
    pipe, params = flaxdiff.load(folder, dtype=jnp.bfloat16)
    options = dict(height=args.side, width=args.side, num_inference_steps=args.steps)
    inputs = pipe.prepare_inputs(prompt=[common.PROMPT] * args.batch, **options)
    inputs = jax.device_put(inputs)
    draw = jax.jit(pipe.generate)
    seconds = common.median(lambda: draw(params, jax.random.key(0), inputs).block_until_ready(), args.repeat)
    peak = device.memory_stats()["peak_bytes_in_use"] / 1e9 if device.platform == "gpu" else common.peak_memory()
    return {"time of a picture, s": seconds / args.batch, "peak memory, GB": peak}


def peer(args: argparse.Namespace) -> common.Figures:
    import diffusers
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not args.tiny:
        sys.exit("PyTorch finds no GPU; install its CUDA build on a machine with one, or give --tiny.")
    folder = common.checkpoint(args.model, args.tiny, "bfloat16")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe = pipe.to("cuda" if cuda else "cpu")
    pipe.set_progress_bar_config(disable=True)
    if args.model == "sdxl":
        pipe.vae.config.force_upcast = False  # as ours: the autoencoder in bfloat16
    pipe.fuse_qkv_projections()
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    search = {"backend": "eager"} if args.tiny else {"mode": "max-autotune"}
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, **search)
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, **search)

    options = dict(height=args.side, width=args.side, num_inference_steps=args.steps, output_type="pt")
    prompts = [common.PROMPT] * args.batch

    def draw() -> None:
        pipe(prompts, **options)
        if cuda:
            torch.cuda.synchronize()

    seconds = common.median(draw, args.repeat, warm_up=3)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else common.peak_memory()
    return {"time of a picture, s": seconds / args.batch, "peak memory, GB": peak}


if __name__ == "__main__":
    parser = common.arguments(__doc__, model="sdxl", side=1024, steps=30, batch=1)
    claim = "{model} on a GPU, bfloat16, {steps} steps, batch {batch}, {side} x {side}"
    common.compare(claim, parser, ours=ours, peer=peer)
