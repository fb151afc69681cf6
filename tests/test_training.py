"""Training: what a step changes, what it leaves alone, and that a run stopped and resumed ends with the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flaxdiff
from flaxdiff import weights
from flaxdiff.core import apply, init
from flaxdiff.models.autoencoder_kl import AutoencoderKL
from flaxdiff.models.unet_2d_condition import UNet2DConditionModel
from flaxdiff.schedulers import DDIMScheduler
from flaxdiff.training import loop, losses, noising, report, state

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


def test_empty_selection_is_named():
    with pytest.raises(ValueError, match="'vae' matches no parameter"):
        state.select({"unet": {"w": 1}}, "vae")


def test_autoencoder_learns():
    spec = AutoencoderKL.from_config(
        {"block_out_channels": [8], "norm_num_groups": 4, "mid_block_add_attention": False}
    )
    tx = optax.adam(1e-2)
    step = state.jitted(losses.reconstruction(spec), tx)
    now = state.create(init(spec, jax.random.key(0)), tx)
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
