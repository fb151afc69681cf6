"""Training: what a step changes, what it leaves alone, and that a run stopped and resumed ends with the same bits."""

import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from PIL import Image
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

import flaxdiff
from flaxdiff import parallel, weights
from flaxdiff.checkpoint.writing import save_model
from flaxdiff.core import apply, init
from flaxdiff.models.autoencoder_kl import AutoencoderKL
from flaxdiff.models.unet_2d_condition import UNet2DConditionModel
from flaxdiff.schedulers import DDIMScheduler
from flaxdiff.training import adversarial, data, loop, losses, noising, optimizers, report, state
from flaxdiff.training import run as running
from flaxdiff.training.config import Config, Run

UNET = UNet2DConditionModel.from_config(
    {
        "sample_size": 4,
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "attention_head_dim": 1,
        "norm_num_groups": 4,
    }
)


@pytest.fixture(autouse=True)
def optax_promotes():
    """Adam of optax raises a number to an integer array, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PATH = noising.path_of(DDIMScheduler())


def batch_at(n: int) -> dict[str, np.ndarray]:
    """Latents that the text determines."""
    rng = np.random.default_rng(n)
    text = rng.choice([-1.0, 1.0], (8, 3, 8)).astype(np.float32)
    return {"latents": np.broadcast_to(text[:, :1, None, :4], (8, 4, 4, 4)).copy(), "text": text}


def predict(params, x, t, batch):
    return apply(UNET, params["unet"], x, t, encoder_hidden_states=batch["text"])


@functools.cache
def run():
    """A compiled step and a fresh start: all but the embedding of time is trained."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    loss = losses.denoising(predict, PATH._replace(prediction_type="sample"))
    params = {"unet": init(UNET, jax.random.key(0))}
    start = lambda: state.create(jax.tree.map(jnp.copy, params), tx, trainable=r"unet\.(?!time_embedding).*")
    return state.jitted(loss, tx, 0.9), start


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_loss_falls_and_frozen_parameters_stay():
    step, start = run()
    told: list[report.Moment] = []
    before = start()
    after = loop.fit(step, start(), batch_at, jax.random.key(1), 200, log_every=50, writers=[told.append])
    seen = [moment.figures["loss_low"] for moment in told]
    assert [moment.step for moment in told] == [50, 100, 150, 200] and seen[-1] < 0.5 * seen[0], told
    old, new = state.paths(before.params), state.paths(after.params)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert moved == set(before.trainable) and len(moved) < len(old)
    assert step._cache_size() == 1, "a step was compiled twice"


def test_resumed_run_ends_with_the_same_bits(tmp_path):
    step, start = run()
    key = jax.random.key(1)
    straight = loop.fit(step, start(), batch_at, key, 7, writers=[])

    fit = functools.partial(loop.fit, step, directory=tmp_path, save_every=2, writers=[])
    killed = []

    def dies(n: int):  # the process ends while batch 5 is prepared; the last checkpoint is that of step 4
        if n == 5 and not killed:
            killed.append(n)
            raise KeyboardInterrupt
        return batch_at(n)

    with pytest.raises(KeyboardInterrupt):
        fit(start(), dies, key, 7)
    assert same(straight, fit(start(), dies, key, 7))


def test_average_follows_the_parameters():
    tx = optax.sgd(0.1)
    now = state.create({"w": jnp.float32(1)}, tx)
    loss = lambda params, batch, key: (params["w"] * batch, {})
    seen = [1.0]
    for n in range(3):
        now, _ = state.train_step(loss, tx, now, jnp.float32(1), jax.random.key(0), decay=0.15)
        d = min(0.15, (1 + n) / (10 + n))
        seen.append(d * seen[-1] + (1 - d) * float(now.params["w"]))
    np.testing.assert_allclose(float(state.averaged(now)["w"]), seen[-1], rtol=1e-6)


def test_a_loss_that_asks_the_average():
    """It is asked as it was before the update, no gradient reaches it, and it follows at one pace from the first."""
    tx, batch = optax.sgd(0.1), jnp.float32([1.0, 3.0])

    def loss(params, batch, key):
        error = params["w"] - 2 * params["averaged"]["w"] * params["averaged"]["fixed"] - batch
        return jnp.square(error).mean(), {}

    for parts in (1, 2):
        now = state.create({"w": jnp.float32(1), "fixed": jnp.float32(3)}, tx, "w")
        step = state.jitted(loss, tx, 0.9, target=True, parts=parts)
        w, slow = 1.0, 1.0
        for _ in range(3):
            now, _ = step(now, batch, jax.random.key(0))
            w, old = w - 0.2 * (w - 6 * slow - 2), slow
            slow = 0.9 * old + 0.1 * w
            np.testing.assert_allclose([now.params["w"], now.ema["w"]], [w, slow], rtol=1e-6)
        assert "averaged" not in now.params


def test_empty_selection_is_named():
    with pytest.raises(ValueError, match="'vae' matches no parameter"):
        state.select({"unet": {"w": 1}}, "vae")


def test_autoencoder_learns():
    spec = AutoencoderKL.from_config(
        {"block_out_channels": [8], "norm_num_groups": 4, "mid_block_add_attention": False}
    )
    tx = optax.adam(1e-2)
    step = state.jitted(adversarial.autoencoding(spec, adversarial.gaussian(), rec_loss="edges"), tx)
    now = state.create({"vae": init(spec, jax.random.key(0))}, tx)
    batch = {"image": np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)}
    seen = []
    for _ in range(12):
        now, metrics = step(now, batch, jax.random.key(0))
        seen.append(float(metrics["psnr"]))
    assert seen[-1] > seen[0] + 1, seen


def test_a_network_that_begins_as_a_frozen_one():
    """Both may be the same arrays: the step takes the memory of its state, and must not take that twice."""
    w = jnp.ones(4)
    loss = lambda params, x, key: (jnp.square(params["net"]["w"] * params["control"]["w"] * x - 2).mean(), {})
    tx = optax.sgd(0.1)
    first = state.create({"net": {"w": w}, "control": {"w": w}}, tx, trainable=r"control\..*")
    step, key = state.jitted(loss, tx), jax.random.key(0)
    after, _ = step(first, jnp.ones(4), key)
    after, metrics = step(after, jnp.ones(4), key)
    assert (after.params["net"]["w"] == 1).all() and (after.params["control"]["w"] > 1).all()
    assert 0 < float(metrics["loss"]) < 1


def test_a_lora_to_train():
    """It changes nothing at first; its factors alone move; what was not asked for has none."""
    pipe, params = flaxdiff.load()
    adapter = flaxdiff.init_lora(pipe, jax.random.key(0), 2, r"unet\.mid_block\..*to_q")
    assert [name.split(".")[-2] for name in adapter["unet"]] == ["to_q"] * 2
    adapted = flaxdiff.set_adapters(params, [adapter])
    name = next(iter(adapter["unet"]))
    np.testing.assert_array_equal(weights.dense(adapted["unet"][name]), params["unet"][name])
    hot = state.select(adapted, r".*\.(down|up)")
    assert sorted(path.rsplit(".", 1)[1] for path in hot) == ["down", "down", "up", "up"]
    with pytest.raises(ValueError, match="matches no module"):
        flaxdiff.init_lora(pipe, jax.random.key(0), targets="unet")


# --- the step ---------------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_add_up():
    """Gradients of four parts, one after the other, are those of the whole; numbers that all share stay as they are."""
    loss = lambda params, batch, key: (jnp.square(batch["x"] @ params["w"] * batch["factor"] - batch["y"]).mean(), {})
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
    batch = {"x": draw(0, 8, 5), "y": draw(1, 8, 3), "factor": np.float32(2)}
    tx = optax.sgd(0.1)
    now = lambda: state.create({"w": draw(2, 5, 3)}, tx)
    whole, parts = (state.train_step(loss, tx, now(), batch, jax.random.key(0), parts=n) for n in (1, 4))
    np.testing.assert_allclose(whole[0].params["w"], parts[0].params["w"], rtol=1e-5)
    np.testing.assert_allclose(whole[1]["loss"], parts[1]["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match="does not divide into 3 parts"):
        state.train_step(loss, tx, now(), batch, jax.random.key(0), parts=3)


def test_bfloat16_is_for_the_loss_alone():
    seen = []
    loss = lambda params, batch, key: (
        seen.append(params["net"]["w"].dtype) or jnp.square(params["net"]["w"]).sum(),
        {},
    )
    tx = optax.sgd(1e-3)
    now = state.create({"net": {"w": jnp.ones(4, jnp.bfloat16)}, "vae": {"w": jnp.ones(1)}}, tx, r"net\..*")
    after, _ = state.train_step(loss, tx, now, None, jax.random.key(0), dtype=jnp.bfloat16)
    assert seen == [jnp.bfloat16] and after.params["net"]["w"].dtype == jnp.float32
    np.testing.assert_allclose(after.params["net"]["w"], 0.998, rtol=1e-6)  # bfloat16 has no such number
    assert after.frozen["vae"]["w"].dtype == jnp.float32


def test_a_state_without_an_average():
    now = state.create({"w": jnp.ones(2)}, optax.sgd(0.1), average=False)
    after, _ = state.train_step(lambda p, b, k: (p["w"].sum(), {}), optax.sgd(0.1), now, None, jax.random.key(0))
    assert after.ema == {} and (state.averaged(after)["w"] == after.params["w"]).all()


# --- optimisers and rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_rates_are_those_of_diffusers(name):
    from diffusers.optimization import get_scheduler

    steps, warmup, own = 40, 0 if name == "constant" else 7, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.5)
    options = {"num_warmup_steps": warmup, "num_training_steps": steps, "num_cycles": 3, "power": 2.0}
    theirs = get_scheduler(name, own, **options)
    expected = []
    for _ in range(steps):
        expected.append(own.param_groups[0]["lr"])
        own.step(), theirs.step()
    # PyTorch's polynomial does not end at zero but at 1e-7
    ours = optimizers.schedule(name, 0.5, steps, warmup, cycles=3, power=2.0)
    np.testing.assert_allclose([ours(n) for n in range(steps)], expected, atol=2e-7, rtol=1e-6)


def test_adamw_is_that_of_pytorch():
    """Three steps with clipping and decay, and a rate of its own for the text encoder."""
    start = {"unet.w": np.float32([[1, -2], [3, 0.5]]), "text_encoder.w": np.float32([0.1, -0.3])}
    theirs = {path: torch.nn.Parameter(torch.tensor(a)) for path, a in start.items()}
    groups = [{"params": [theirs["unet.w"]], "lr": 0.1}, {"params": [theirs["text_encoder.w"]], "lr": 0.01}]
    own = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    tx = optimizers.optimizer("adamw", 0.1, b2=0.99, decay=0.1, factors=[("^text_encoder", 0.1)])
    ours, opt = {path: jnp.asarray(a) for path, a in start.items()}, None
    for _ in range(3):
        own.zero_grad()
        sum((p**3).sum() for p in theirs.values()).backward()
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        own.step()
        opt = tx.init(ours) if opt is None else opt
        updates, opt = tx.update(jax.tree.map(lambda p: 3 * p**2, ours), opt, ours)
        ours = optax.apply_updates(ours, updates)
    for path, parameter in theirs.items():
        np.testing.assert_allclose(ours[path], parameter.detach(), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_each_optimiser_learns(name):
    """A linear map from examples; the loss falls to a tenth. AdamW in 8 bits takes a third of the room."""
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
    x, target = draw(0, 256, 64), draw(1, 64, 128) / 8
    loss = lambda params, batch, key: (jnp.square(x @ params["net"]["w"] - x @ target).mean(), {})
    rate = {"prodigy": 1.0, "sgd": 5.0, "muon": 0.05}.get(name, 0.01)
    tx = optimizers.optimizer(name, rate, decay=0.0, max_grad_norm=None)
    now, step = state.create({"net": {"w": jnp.zeros((64, 128))}}, tx), state.jitted(loss, tx)
    told = []
    for _ in range(60):
        now, metrics = step(now, None, jax.random.key(0))
        told.append(float(metrics["loss"]))
    assert told[-1] < 0.1 * told[0], told[::10]
    if name == "adamw8bit":
        plain = optimizers.optimizer("adamw", rate).init(now.trainable)
        size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
        assert size(now.opt) < 0.35 * size(plain)


def test_unknown_names_and_rates():
    with pytest.raises(ValueError, match="optimizer='adam' is not known"):
        optimizers.optimizer("adam", 0.1)
    with pytest.raises(ValueError, match="lr_scheduler='step' is not known"):
        optimizers.schedule("step", 0.1, 10)
    with pytest.raises(ValueError, match="warm-up of 10 updates does not fit"):
        optimizers.schedule("cosine", 0.1, 10, 10)


# --- many devices -----------------------------------------------------------------------------------------------------


def trained(devices: int, steps: int, folder=None, save_every: int = 1000) -> tuple[list[float], state.TrainState]:
    """The losses of a run on so many of the fake devices, with weights and batch divided."""
    mesh = parallel.make_mesh("fsdp", jax.devices()[:devices])
    tx = optimizers.adam(1e-3, 40, warmup=2)
    loss = losses.denoising(predict, PATH._replace(prediction_type="v_prediction"))
    with jax.set_mesh(mesh):
        first = state.create({"unet": init(UNET, jax.random.key(0))}, tx)
        places = parallel.shardings(first, mesh)
        step = state.jitted(loss, tx, places=places)
        told: list[report.Moment] = []
        final = loop.fit(
            step,
            jax.device_put(first, places),
            batch_at,
            jax.random.key(1),
            steps,
            directory=folder,
            save_every=save_every,
            log_every=1,
            writers=[told.append],
            place=lambda batch: parallel.shard(batch, mesh),
        )
    return [moment.figures["loss"] for moment in told if "loss" in moment.figures], final


def test_losses_on_one_device_and_on_eight():
    (one, _), (eight, final) = trained(1, 20), trained(8, 20)
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    weight = final.trainable["unet.down_blocks.0.resnets.0.conv1.weight"]
    assert weight.addressable_shards[0].data.size == weight.size // 8


def test_checkpoint_of_eight_devices_goes_on_with_two(tmp_path):
    _, straight = trained(8, 6)
    trained(8, 4, tmp_path)
    rest, final = trained(2, 6, tmp_path)
    assert len(rest) == 2 and len(final.trainable["unet.conv_in.weight"].sharding.device_set) == 2
    for path, a in straight.trainable.items():
        np.testing.assert_allclose(a, final.trainable[path], atol=1e-6, err_msg=path)


# --- stopping and going on --------------------------------------------------------------------------------------------

RUN = """
import sys, time, numpy as np, jax, jax.numpy as jnp, optax
from flaxdiff.training import loop, state
folder, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
seen = open(folder + "/seen", "a")
def batch_at(n):
    time.sleep(pause)
    seen.write(f"{n}\\n"), seen.flush()
    return np.random.default_rng(n).standard_normal((8, 4)).astype(np.float32)
def loss(params, batch, key):
    return jnp.square(batch @ params["w"] + jax.random.normal(key, (8, 3))).mean(), {}
tx = optax.adam(0.01)
step, first = state.jitted(loss, tx), state.create({"w": jnp.ones((4, 3))}, tx)
final = loop.fit(step, first, batch_at, jax.random.key(0), steps, directory=folder + "/run", save_every=5, log_every=50)
np.savez(folder + "/final", w=final.params["w"], ema=final.ema["w"])
"""


def start_run(folder, steps: int, pause: float) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    command = [sys.executable, "-c", RUN, str(folder), str(steps), str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def saved_steps(folder) -> list[int]:
    """The steps of whole checkpoints; what is being written has another name."""
    return sorted(int(p.name) for p in (folder / "run").glob("*") if p.name.isdecimal())


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_with_the_same_bits(tmp_path):
    """SIGKILL at random moments of a run of 200 steps; the last start goes through."""
    kills = int(os.environ.get("FLAXDIFF_KILLS", "4"))
    pause = max(0.02, kills / 500)  # of a step, for the run to be long enough
    rng, straight, killed = random.Random(0), tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    assert start_run(straight, 200, 0).wait() == 0
    done = 0
    while done < kills:
        run, before = start_run(killed, 200, pause), saved_steps(killed)
        while run.poll() is None and saved_steps(killed) == before and 200 not in before:
            time.sleep(0.01)  # until it has got anywhere
        time.sleep(rng.uniform(0, 0.4))
        run.kill()
        done += run.wait() == -signal.SIGKILL
        assert 200 not in saved_steps(killed) or done >= kills - 1, "the run is too short for so many kills"
    last = start_run(killed, 200, 0)
    assert last.wait() == 0, last.stdout.read()
    ours, theirs = np.load(killed / "final.npz"), np.load(straight / "final.npz")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ("w", "ema"))
    seen = list(map(int, (killed / "seen").read_text().split()))
    assert set(seen) == set(range(200)) and all(b == a + 1 or b % 5 == 0 for a, b in itertools.pairwise(seen))


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(tmp_path):
    run = start_run(tmp_path, 100_000, 0.01)
    while not saved_steps(tmp_path):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 0
    last = saved_steps(tmp_path)[-1]
    assert last > 5 and not (tmp_path / "final.npz").exists()


def test_what_a_folder_refuses(tmp_path):
    step, start = run()
    fit = functools.partial(loop.fit, step, writers=[], directory=tmp_path)
    fit(start(), batch_at, jax.random.key(1), 2)
    with pytest.raises(ValueError, match="a run with another seed"):
        fit(start(), batch_at, jax.random.key(2), 3)
    other = state.create({"unet": init(UNET, jax.random.key(0))}, optax.sgd(0.1))
    with pytest.raises(ValueError, match="other parameters or another optimiser"):
        fit(other, batch_at, jax.random.key(1), 3)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="file"):
        loop.fit(step, start(), batch_at, jax.random.key(1), 2, writers=[], directory=file / "run")


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    free = namedtuple("Usage", "total used free")(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    step, start = run()
    with pytest.raises(OSError, match="do not fit into the 0.00 GB"):
        loop.fit(step, start(), batch_at, jax.random.key(1), 2, writers=[], directory=tmp_path)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    tx = optax.sgd(0.1)
    loss = lambda params, batch, key: (params["w"] * jnp.where(batch > 3, jnp.nan, 1.0), {})
    step, start = state.jitted(loss, tx), state.create({"w": jnp.float32(1)}, tx)
    data = lambda n: jnp.float32(n)
    with pytest.raises(FloatingPointError, match="nan at step 6"):
        loop.fit(step, start, data, jax.random.key(0), 9, directory=tmp_path, save_every=2, log_every=9, writers=[])
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()) == [2, 4]


def test_the_best_checkpoint_stays(tmp_path):
    """By a figure of validation, where less is better: that of step 4 of 10."""
    tx = optax.sgd(0.1)
    loss = lambda params, batch, key: (params["w"] * 1.0, {})
    step, start = state.jitted(loss, tx), state.create({"w": jnp.float32(1)}, tx)
    judge = lambda now: {"away": abs(int(now.step) - 4)}
    options = dict(directory=tmp_path, save_every=2, keep=1, best="-away", validate=judge, validate_every=2, writers=[])
    loop.fit(step, start, lambda n: n, jax.random.key(0), 10, **options)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()) == [4, 10]


# --- what is told -----------------------------------------------------------------------------------------------------


def test_lines_files_and_speed(tmp_path, capsys):
    picture = Image.new("RGB", (4, 4))
    moment = report.Moment(7, 10, {"loss": 0.5, "validation": picture})
    report.line(moment), report.jsonl(tmp_path / "log.jsonl")(moment)
    assert capsys.readouterr().out == "step 7/10  loss 0.5\n"
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 7, "loss": 0.5}
    assert Image.open(tmp_path / "validation_0000007.png").size == (4, 4)


def events(folder) -> list:
    """What TensorBoard is to read: records of a length, its checksum, an event and its checksum."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        raw = path.read_bytes()
        while raw:
            size, sum_of_size = struct.unpack("<QI", raw[:12])
            body, (sum_of_body,) = raw[12 : 12 + size], struct.unpack("<I", raw[12 + size : 16 + size])
            assert (sum_of_size, sum_of_body) == (masked_crc32c(raw[:8]), masked_crc32c(body))
            found.append(event_pb2.Event.FromString(body))
            raw = raw[16 + size :]
    return found


def test_what_tensorboard_reads(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8))
    config = Config("lora", run=Run(output=str(tmp_path), report_to=("tensorboard",)))
    _, write = running.writers(config)
    write(report.Moment(7, 10, {"loss": 0.5, "steps/s": 2.0, "validation": picture}))
    write(report.Moment(8, 10, {"loss": 0.25}))
    told, until = [], time.monotonic() + 20
    while len(told) < 4 and time.monotonic() < until:  # its thread may write a little later
        time.sleep(0.2)
        told = [(event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    figures = [(n, value.tag, value.simple_value) for n, value in told if value.HasField("simple_value")]
    assert figures == [(7, "loss", 0.5), (7, "steps/s", 2.0), (8, "loss", 0.25)]
    ((n, value),) = [(n, value) for n, value in told if value.HasField("image")]
    shown = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert (n, value.tag) == (7, "validation") and np.array_equal(np.asarray(shown), np.asarray(picture))


@pytest.mark.parametrize(
    "name, module, said",
    [("tensorboard", "tensorboardX", r"\.\[train\]"), ("wandb", "wandb", "install wandb")],
)
def test_a_report_without_its_library(name, module, said, tmp_path, monkeypatch):
    """The command says so before it begins, and what to install."""
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with pytest.raises(ImportError, match=said):
        running.writers(Config("lora", run=Run(output=str(tmp_path), report_to=(name,))))


def test_what_weights_and_biases_is_told(tmp_path, monkeypatch):
    """The calls, by a stand-in for its package."""
    told, picture = [], Image.new("RGB", (5, 3), (9, 8, 7))
    stand_in = types.SimpleNamespace(
        init=lambda dir, **options: (
            told.append((Path(dir).is_dir(), dir, options))
            or types.SimpleNamespace(log=lambda *a, **k: told.append((*a, k)))
        ),
        Image=lambda shown: ("a picture", shown.size),
    )
    config = Config("lora", run=Run(output=str(tmp_path / "new"), report_to=("wandb",)))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    _, write = running.writers(config)
    write(report.Moment(7, 10, {"loss": 0.5, "validation": picture}))
    figures = {"loss": 0.5, "validation": ("a picture", (5, 3))}
    assert told == [(True, str(tmp_path / "new"), {"project": "flaxdiff"}), (figures, {"step": 7})]


def test_weights_and_biases_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    picture, config = Image.new("RGB", (5, 3)), Config("lora", run=Run(output=str(tmp_path), report_to=("wandb",)))
    running.writers(config)[1](report.Moment(7, 10, {"loss": 0.5, "validation": picture}))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("output", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run")])
def test_an_output_that_is_no_folder(output, tmp_path, monkeypatch):
    """A URL is refused before work begins, and makes no folder of its name."""
    monkeypatch.chdir(tmp_path)
    state_ = state.create({"w": jnp.zeros(2)}, optax.sgd(0.1))
    for write in (
        lambda: running.train(Config("no recipe", run=Run(output=str(output)))),
        lambda: loop.fit(lambda *a: a, state_, batch_at, jax.random.key(0), 1, directory=output),
        lambda: data.precompute(None, {}, None, data.Examples(), output),
        lambda: save_model(output, UNET, {}),
    ):
        with pytest.raises(ValueError, match=r"(gs|s3):/.* is no folder of this machine.*mounted.*copy"):
            write()
    assert not list(tmp_path.iterdir())


def test_flops_are_those_of_the_compiled_program():
    """A network that is scanned, against XLA's count of one that is not."""
    args = jnp.zeros((2, 16, 16, 4)), 5.0, jnp.zeros((2, 3, 8))
    call = lambda spec, params: apply(spec, params, *args)
    params = init(UNET, jax.random.key(0))
    ours = report.flops(functools.partial(call, UNET), params)
    theirs = jax.jit(functools.partial(call, UNET)).lower(params).compile().cost_analysis()["flops"]
    # XLA also counts what is done to each number, and leaves out a window's products with the zeros around a picture
    assert 0.8 * theirs < ours <= theirs


def test_prodigy_warms_up():
    """From a rate of 0, by whose sums it divides."""
    tx, x = optimizers.optimizer("prodigy", optimizers.schedule("constant", 1.0, 100, warmup=5)), {"w": jnp.ones(3)}
    now = tx.init(x)
    for _ in range(60):
        updates, now = tx.update({"w": x["w"] - 3}, now, x)
        x = optax.apply_updates(x, updates)
    assert np.isfinite(x["w"]).all() and float(jnp.abs(x["w"] - 1).min()) > 1e-4


@pytest.mark.parametrize("name", sorted(set(optimizers.OPTIMIZERS) - {"prodigy"}))
def test_weights_decay_by_the_rate(name):
    """Without a gradient an update takes off rate · decay, no more."""
    tx = optimizers.optimizer(name, lambda n: 0.1, decay=0.01)
    params = {"w": jnp.ones((8, 8))}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.001, rtol=1e-4)


def test_a_plan_is_whole_in_every_part():
    plan = DDIMScheduler().plan(3)
    loss = lambda params, batch, key: (params["w"] * batch["x"].mean() * batch["plan"].timesteps.mean(), {})
    batch = {"plan": plan, "x": np.ones((4, 2), np.float32)}
    now = state.create({"w": jnp.float32(1)}, optax.sgd(0.1))
    _, metrics = state.train_step(loss, optax.sgd(0.1), now, batch, jax.random.key(0), parts=2)
    np.testing.assert_allclose(metrics["loss"], plan.timesteps.mean(), rtol=1e-6)
