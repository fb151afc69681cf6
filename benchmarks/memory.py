"""What the settings of docs/memory.md save, and what 8 bits cost in quality; one JSON line for each figure.

python benchmarks/memory.py quality            # pictures of the shipped model
python benchmarks/memory.py weights            # of SDXL, from shapes alone
python benchmarks/memory.py decode host train  # by the TPU compiler, for one v5e chip; needs no TPU
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import flaxdiff
from flaxdiff import parallel
from flaxdiff.planning import chips, plan
from flaxdiff.published import COMPONENTS

PROMPTS = (
    "red apple",
    "dog face on blue",
    "grinning face",
    "rocket on green",
    "blue book",
    "cat on pink",
    "tree",
    "key",
)


def quality() -> Iterator[tuple[str, list[float]]]:
    """PSNR in dB, mean and least, of 8 pictures of 20 steps, to the same in float32."""
    pipe, params = flaxdiff.load()
    pipe = pipe.replace(progress=False)
    alone = lambda kind: params | {"unet": flaxdiff.quantize(params["unet"], kind)}
    draw = lambda params: (
        pipe(params, jax.random.key(0), prompt=PROMPTS, num_inference_steps=20, output_type="np").images
    )
    true = draw(params)
    for what, changed in {
        "bfloat16": flaxdiff.cast(params, jnp.bfloat16),
        "int8": flaxdiff.quantize(params, "int8"),
        "fp8": flaxdiff.quantize(params, "fp8"),
        "int8, U-Net alone": alone("int8"),
        "fp8, U-Net alone": alone("fp8"),
    }.items():
        psnr = -10 * np.log10(np.square(draw(changed) - true).mean((1, 2, 3)))
        yield what, [round(float(psnr.mean()), 1), round(float(psnr.min()), 1)]


def weights() -> Iterator[tuple[str, int]]:
    """Bytes of all networks of SDXL."""
    shapes = {name: flaxdiff.abstract(spec, jnp.bfloat16) for name, spec in plan.pipeline("sdxl").specs}
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    yield "bfloat16", size(shapes)
    yield "int8 or fp8", size(jax.eval_shape(flaxdiff.quantize, shapes))


def on_chip(function: Callable, params: Any, *inputs: Any, host: bool = False) -> dict[str, int]:
    """Bytes of a v5e chip that a function takes, and works in; its parameters may lie on the host."""
    mesh = parallel.make_mesh(devices=chips.describe("v5e:1x1").devices)
    lies = NamedSharding(mesh, PartitionSpec())
    params, *inputs = (plan.laid(tree, jax.tree.map(lambda _: lies, tree)) for tree in (params, *inputs))
    params = flaxdiff.offload(params) if host else params
    with plan.unkept():
        said = jax.jit(function).lower(params, *inputs).compile().memory_analysis()
    return {
        "arguments": said.argument_size_in_bytes,
        "on the host": said.host_argument_size_in_bytes,
        "working": said.temp_size_in_bytes,
    }


def decode() -> Iterator[tuple[str, dict[str, int]]]:
    """Four pictures of 512² by Stable Diffusion's decoder, in bfloat16."""
    kind, config = COMPONENTS["SD VAE"]
    spec = getattr(flaxdiff, kind).from_config(config)
    for settings in ({}, {"slicing": True}, {"slicing": True, "tiling": 256}):
        run = functools.partial(flaxdiff.apply, spec.replace(**settings), method="decode")
        yield (
            str(settings),
            on_chip(run, flaxdiff.abstract(spec, jnp.bfloat16), jax.ShapeDtypeStruct((4, 64, 64, 4), jnp.float32)),
        )


def host() -> Iterator[tuple[str, dict[str, int]]]:
    """SDXL's larger text encoder, its 32 layers scanned."""
    kind, config = COMPONENTS["SDXL text encoder 2"]
    spec = getattr(flaxdiff, kind).from_config(config)
    run = lambda params, ids: flaxdiff.apply(spec, params, ids).last_hidden_state
    for place in (False, True):
        ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
        yield (
            "on the host" if place else "on the chip",
            on_chip(run, flaxdiff.abstract(spec, jnp.bfloat16), ids, host=place),
        )


def train() -> Iterator[tuple[str, int]]:
    """A training step of the shipped model's U-Net, 64 pictures."""
    for remat in ("none", "dots", "full"):
        (part,) = flaxdiff.plan("emoji", "v5e:1x1", batch=64, train=True, remat=remat).parts
        yield f"remat {remat}: working memory, TFLOP", (part.memory.temporary, round(part.cost.flops / 1e12, 3))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for what, figure in {f.__name__: f for f in (quality, weights, decode, host, train)}[name]():
            print(json.dumps({"benchmark": f"memory {name}", "what": what, "figure": figure}), flush=True)
