"""The blocks of FLUX.1 dev on a TPU by the TPU compiler's own account; no TPU is needed.

    python benchmarks/flux.py --chip v6e
    python benchmarks/flux.py --chip v6e --double 19 --single 38

One block of each kind and the two ends, or the whole network, 1024 x 1024 and 512 words, bfloat16, compiled ahead of
time for one chip (see docs/planning.md). The peer's column is cited, not measured in the same run: MaxDiffusion's on
the same chip, read from its compiled program in the same way; of the whole network at its commit 7cfb880 with flash
attention, its embedding of times handed in, compiled on 2026-11-30 three times in turn with ours on the same two cores
(73.5, 74.2, 80.2 s; ours 58.0, 60.6, 66.5). Cycles are the compiler's estimate beside Pallas kernels, for which it has
none.
"""

import argparse
import time

import common

PUBLISHED = {  # blocks of each kind -> figures
    (1, 1): {"cycles beside Pallas, M": 20.7, "arithmetic, TFLOP": 2.11, "traffic by XLA's count, GB": 5.6},
    (19, 38): {"cycles beside Pallas, M": 466.5, "traffic by XLA's count, GB": 7.2, "compile, s": 76.0},
}


def ours(args: argparse.Namespace) -> common.Figures:
    import jax
    import jax.numpy as jnp

    import flaxdiff
    from flaxdiff.core import abstract, apply
    from flaxdiff.nn.packing import places
    from flaxdiff.planning import chips, hlo, plan

    blocks = {"num_layers": args.double, "num_single_layers": args.single, "guidance_embeds": True}
    tiny = dict(num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=64) if args.tiny else {}
    spec = flaxdiff.FluxTransformer2DModel.from_config({**blocks, **tiny})
    side, words = (8, 16) if args.tiny else (64, 512)
    place = jax.sharding.SingleDeviceSharding(chips.describe(f"{args.chip}:1x1").devices[0])
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    c, params = spec.config, {name: of(*a.shape) for name, a in abstract(spec).items()}
    pooled, numbers = of(1, c.pooled_projection_dim), of(1, dtype=jnp.float32)
    told = jax.eval_shape(lambda *a: apply(spec, *a, method="times"), params, numbers, pooled, numbers)
    told = jax.tree.map(lambda a: of(*a.shape), told)  # worked out once for all steps

    def step(params, x, text, told):
        return apply(spec, params, x, text, None, told, places(side, side))

    lowered = jax.jit(step).lower(params, of(1, side**2, 64), of(1, words, c.joint_attention_dim), told)
    start = time.perf_counter()
    with plan.unkept():
        made = lowered.compile()
    seconds, cost = time.perf_counter() - start, hlo.Program(made.as_text()).cost()
    said = made.cost_analysis()
    return {
        "cycles beside Pallas, M": cost.cycles / 1e6,
        "arithmetic, TFLOP": said["flops"] / 1e12,
        "traffic by XLA's count, GB": said["bytes accessed"] / 1e9,
        "traffic with HBM, GB": cost.bytes / 1e9,
        "temporary memory, GB": made.memory_analysis().temp_size_in_bytes / 1e9,
        "compile, s": seconds,
    }


def peer(args: argparse.Namespace) -> common.Figures:
    return {} if args.chip != "v6e" or args.tiny else PUBLISHED.get((args.double, args.single), {})


if __name__ == "__main__":
    parser = common.arguments(__doc__, chip="v6e", double=1, single=1)
    claim = "FLUX.1 dev, {double} double and {single} single block with the ends, 1024 x 1024, bfloat16, one {chip}"
    common.compare(claim, parser, ours=ours, peer=peer)
