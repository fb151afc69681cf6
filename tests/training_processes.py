"""One process of several: `flaxdiff train`, pictures of its result, and a run over a stream that is stopped halfway.

`python tests/training_processes.py FOLDER DEVICES`, in the surroundings that `parallel.start` reads; `test_parallel.py`
puts a configuration and data into the folder, and compares what is there afterwards.
"""

import functools
import json
import os
import sys
from pathlib import Path

folder, devices = Path(sys.argv[1]), sys.argv[2]
# of two of a kind the last counts: as the tests have it, but for the number of devices
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import flaxdiff  # noqa: E402
from flaxdiff import cli, parallel  # noqa: E402
from flaxdiff.training import data, loop, state  # noqa: E402

assert cli.main(["train", str(folder / "config.py"), "--output", str(folder / "two")]) == 0

mesh = parallel.make_mesh("fsdp")
pipe, params = flaxdiff.load(folder / "two", mesh=mesh)
with jax.set_mesh(mesh):
    images = pipe(params, jax.random.key(0), batch_size=4, num_inference_steps=2, output_type="np").images
np.save(folder / f"images{jax.process_index()}.npy", images)


# a stream of which one process has rows that are of no use: its place is another than that of its neighbour
def loader() -> data.DataLoader:
    source = data.open_source(folder / "stream.parquet", streaming=True)
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return data.DataLoader(data.Stream.of(source, data.Examples(resolution=8), 4, shuffle=False, **place))


seen, tx = [], optax.sgd(0.1, momentum=0.9)
step = state.jitted(lambda params, batch, key: (jnp.sum(params["w"]), {}), tx)
first = lambda: state.create({"w": jnp.zeros((4, 2))}, tx)
begin = jax.jit(first, out_shardings=parallel.shardings(jax.eval_shape(first), mesh))
place = lambda batch: seen.append(batch["caption"])
fit = functools.partial(loop.fit, step, directory=folder / "stream", save_every=9, writers=[], place=place)
for steps in (2, 4):  # stopped, and started again
    final = fit(begin(), loader(), jax.random.key(0), steps)
straight, expected, places = loader(), [], []
for _ in range(4):
    expected.append(next(straight)["caption"])
    places.append(straight.get_state()["read"])
told = {"seen": seen, "expected": expected, "places": places, "w": parallel.collected(final.params)["w"].tolist()}
(folder / f"stream{jax.process_index()}.json").write_text(json.dumps(told))
