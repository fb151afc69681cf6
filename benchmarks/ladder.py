"""The ladder of diffusers' tutorial "Effective and efficient diffusion", rung by rung: ours and PyTorch's.

    python benchmarks/ladder.py --side 512 --steps 50 --fewer 20 --batch 8

Stable Diffusion 1.5 in float32; in half precision; with DPM-Solver++ in fewer steps; eight pictures at once with sliced
attention. The tutorial has 30, 11, 4 and 3.5 s a picture on its T4. Random weights; each rung keeps the ones before it.
`--float32` leaves the second out, for processors that have no arithmetic in half precision.
"""

import argparse

import common


def rungs(args: argparse.Namespace) -> dict[str, dict]:
    """What each rung asks for: the name, and what differs from float32 and all steps."""
    half = {} if args.float32 else {"half": True}
    fast = half | {"steps": args.fewer, "solver": True}
    return {
        f"float32, {args.steps} steps, s a picture": {},
        **({"half precision, s a picture": half} if half else {}),
        f"DPM-Solver++ in {args.fewer} steps, s a picture": fast,
        f"batch of {args.batch}, s a picture": fast | {"batch": args.batch},
    }


def ours(args: argparse.Namespace) -> common.Figures:
    import jax
    import jax.numpy as jnp

    import flaxdiff

    def run(half: bool = False, steps: int = args.steps, solver: bool = False, batch: int = 1) -> float:
        folder = common.checkpoint("sd15", args.tiny)
        pipe, params = flaxdiff.load(folder, dtype=jnp.bfloat16 if half else jnp.float32)
        pipe = pipe.replace(progress=False)
        if solver:
            pipe = pipe.replace(scheduler=flaxdiff.DPMSolverMultistepScheduler.from_config(pipe.scheduler))
        options = dict(height=args.side, width=args.side, num_inference_steps=steps, output_type="np")
        keys = [jax.random.key(i) for i in range(batch)]
        draw = lambda: pipe(params, keys if batch > 1 else keys[0], prompt=[common.PROMPT] * batch, **options)
        return common.median(draw, args.repeat) / batch

    return {name: run(**rung) for name, rung in rungs(args).items()}


def peer(args: argparse.Namespace) -> common.Figures:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(half: bool = False, steps: int = args.steps, solver: bool = False, batch: int = 1) -> float:
        folder = common.checkpoint("sd15", args.tiny)
        dtype = (torch.float16 if device == "cuda" else torch.bfloat16) if half else torch.float32
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=dtype)
        pipe = pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        if solver:
            pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        if batch > 1:
            pipe.enable_attention_slicing()
        options = dict(height=args.side, width=args.side, output_type="np")
        seeds = [torch.Generator(device).manual_seed(i) for i in range(batch)]
        draw = lambda steps: pipe([common.PROMPT] * batch, generator=seeds, num_inference_steps=steps, **options)
        draw(1)  # which is enough: PyTorch compiles nothing for so many steps
        return common.median(lambda: draw(steps), args.repeat, warm_up=0) / batch

    return {name: run(**rung) for name, rung in rungs(args).items()}


if __name__ == "__main__":
    parser = common.arguments(__doc__, side=512, steps=50, fewer=20, batch=8)
    parser.add_argument("--float32", action="store_true", help="no rung in half precision")
    common.compare("The tutorial's ladder, SD 1.5, {side} x {side}", parser, ours=ours, peer=peer)
