"""What saves work between the steps of a run, against the same run without it: time, and how much the pictures change.

    python benchmarks/speedups.py --name deep_cache --strength 3
    python benchmarks/speedups.py --model emoji-flow --name first_block --strength 0.1

A shipped model, eight pictures, 24 steps of its own scheduler. The difference is the mean over all values of the
pictures, which lie between 0 and 1. `--name token_merging` takes a share of tokens; the caches an interval, a step or a
threshold. mag_cache measures what it needs on another prompt first.
"""

import argparse

import common

OPTIONS = {  # what a strength is of each
    "deep_cache": "cache_interval",
    "branch_cache": "cache_interval",
    "tgate": "gate_step",
    "first_block": "threshold",
    "tea_cache": "rel_l1_thresh",
    "mag_cache": "threshold",
    "taylor_seer": "cache_interval",
    "pyramid_attention_broadcast": "spatial_attention_block_skip_range",
}
PROMPTS = ["dog face on blue", "red apple", "slice of pizza", "owl", "rocket", "cactus", "ghost on gray", "octopus"]


def run(args: argparse.Namespace, saving: bool) -> tuple:
    """How to draw the pictures."""
    import jax

    import flaxdiff
    from flaxdiff import caching

    pipe, params = flaxdiff.load(args.model)
    pipe, options = pipe.replace(progress=False), {}
    prompts, steps = (PROMPTS[:1], 2) if args.tiny else (PROMPTS, 24)
    if saving and args.name == "token_merging":
        pipe = pipe.replace(unet=pipe.unet.replace(token_merging=args.strength))
    elif saving:
        options = {OPTIONS[args.name]: args.strength}
        if args.name == "mag_cache":
            other = dict(prompt="cat face", num_inference_steps=steps)
            options["mag_ratios"] = caching.Curve(caching.magnitudes(pipe, params, jax.random.key(1), **other))
        pipe = pipe.replace(cache=getattr(caching, args.name))
    call = lambda: pipe(
        params, jax.random.key(0), prompt=prompts, num_inference_steps=steps, output_type="np", **options
    )
    return lambda: call().images


def ours(args: argparse.Namespace) -> common.Figures:
    import numpy as np

    draw = run(args, True)
    seconds = common.median(draw, args.repeat)
    return {
        "time of a picture, s": seconds / len(PROMPTS),
        "difference": float(np.abs(draw() - run(args, False)()).mean()),
    }


def peer(args: argparse.Namespace) -> common.Figures:
    return {"time of a picture, s": common.median(run(args, False), args.repeat) / len(PROMPTS)}


if __name__ == "__main__":
    parser = common.arguments(__doc__, model="emoji", name="deep_cache", strength=3.0)
    common.compare("{model}, 24 steps, {name} {strength:g} against none", parser, ours=ours, peer=peer)
