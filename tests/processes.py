"""One process of several, or the only one: load the shipped model into shards, sample, and train; all must agree.

`python tests/processes.py OUT.npz DEVICES`, in the surroundings that `parallel.start` reads; the first process writes.
"""

import functools
import os
import sys

out, devices = sys.argv[1], sys.argv[2]
# of two of a kind the last counts: as the tests have it, but for the number of devices
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

import flaxdiff  # noqa: E402
from flaxdiff import parallel  # noqa: E402
from flaxdiff.checkpoint import convert  # noqa: E402
from flaxdiff.training import losses, noising, optimizers, state  # noqa: E402

parallel.start()
parallel.start()  # a second time is nothing
first, count = jax.process_index() == 0, jax.process_count()
mesh = parallel.make_mesh("fsdp")
whole = functools.partial(multihost_utils.process_allgather, tiled=True)
results = {"processes": count, "devices": len(jax.devices()), "local": jax.local_device_count()}

# what this process reads of the files
parts, read = [], convert.read
convert.read = lambda *args: parts.append(read(*args)) or parts[-1]
pipe, params = flaxdiff.load(mesh=mesh)
results["read"] = sum(part.nbytes for part in parts)
results["bytes"] = sum(a.nbytes for a in jax.tree.leaves(params))
results["held"] = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(params))

# every process asks for all pictures, and makes its own
things = ["red apple", "dog face on blue", "rocket", "blue book", "cat", "an owl", "cactus", "slice of pizza"]
inputs = parallel.shard(pipe.prepare_inputs(prompt=things, num_inference_steps=2), mesh)
with jax.set_mesh(mesh):
    images = jax.jit(pipe.generate)(params, parallel.replicate(jax.random.key(0), mesh), inputs)
results["images"] = whole(images)

# every process reads its own data
spec, tx = pipe.unet, optimizers.adam(1e-4, 10, warmup=1)
predict = lambda params, x, t, batch: flaxdiff.apply(spec, params["unet"], x, t, batch["text"])
step = state.jitted(losses.denoising(predict, noising.path_of(pipe.scheduler)), tx)
create = functools.partial(state.create, tx=tx, trainable=r"unet\.(up_blocks|conv_out).*")
model = {"unet": params["unet"]}
now = jax.jit(create, out_shardings=parallel.shardings(jax.eval_shape(create, model), mesh))(model)
side, width = spec.config.sample_size, spec.config.cross_attention_dim
for n in range(3):
    rng = np.random.default_rng(n)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: B023
    batch = {"latents": draw(8, side, side, spec.config.in_channels), "text": draw(8, 7, width)}
    mine = slice(8 // count * jax.process_index(), 8 // count * (jax.process_index() + 1))
    batch = parallel.shard({name: a[mine] for name, a in batch.items()}, mesh, part=True)
    with jax.set_mesh(mesh):
        now, metrics = step(now, batch, parallel.replicate(jax.random.key(1), mesh))
    results[f"loss {n}"] = float(metrics["loss"])
    results[f"norm {n}"] = float(metrics["grad_norm"])
for name in ("conv_out.weight", "up_blocks.0.resnets.0.conv1.weight"):
    results[name] = whole(now.params["unet"][name])

if first:
    np.savez(out, **results)
