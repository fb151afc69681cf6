"""Fine-tuning by rewards and preferences: the formulas are PyTorch's, and rewards rise."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import flaxdiff
from flaxdiff.models.unet_2d import UNet2DModel
from flaxdiff.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from flaxdiff.training import distillation, noising, rewards
from flaxdiff.weights import LoRA

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PLAIN = {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # as Stable Diffusion's
KEY = jax.random.key(0)
rng = np.random.default_rng(0)
X = rng.normal(size=(4, 4, 4, 3)).astype(np.float32)


def descend(params, slopes, rate):
    """Every parameter by `rate` against the sign of its gradient."""
    return jax.tree.map(lambda p, g: p - rate * jnp.sign(g), params, slopes)


# --- DDPO ------------------------------------------------------------------------------------------------------------


def scheduler(**options):
    return DDIMScheduler(**PLAIN, **options)


PLAN = scheduler().plan(5, eta=1.0, pad_to=8)


def predict(params, x, t, batch):
    """A small network: what it says of a pixel depends on the time and on a condition."""
    return params["a"] * x + params["b"] * jnp.cos(t / 300).reshape(-1, 1, 1, 1) + batch["c"].reshape(-1, 1, 1, 1)


PARAMS = {"a": jnp.float32(0.8), "b": jnp.zeros(3)}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_transitions_are_those_of_diffusers(kind):
    """Mean and deviation of DDIMScheduler.step with η = 1, rows and images independently; its density is Normal's."""
    plan = rewards.drawing(scheduler(prediction_type=kind).plan(5, eta=1.0))
    theirs = diffusers.DDIMScheduler(**PLAIN, prediction_type=kind)
    theirs.set_timesteps(5)
    output, row, to = X[::-1].copy(), np.array([0, 2, 4, 1]), rng.normal(size=X.shape).astype(np.float32)
    mean, std = rewards.transition(plan, jnp.asarray(row), X, output)
    for i, r in enumerate(row):
        t = theirs.timesteps[r]
        zero = torch.zeros(1, 4, 4, 3)
        x, out = torch.tensor(X[i : i + 1]), torch.tensor(output[i : i + 1])
        there = theirs.step(out, t, x, eta=1.0, variance_noise=zero).prev_sample
        np.testing.assert_allclose(mean[i], there[0], rtol=1e-4, atol=1e-5)
        deviation = theirs._get_variance(t, t - 200) ** 0.5
        np.testing.assert_allclose(std[i].squeeze(), deviation, rtol=1e-4)
        ours = rewards.log_density(to[i : i + 1], mean[i : i + 1], std[i : i + 1])
        normal = torch.distributions.Normal(there[0], deviation).log_prob(torch.tensor(to[i])).mean()
        np.testing.assert_allclose(ours[0], normal, rtol=1e-4)


def test_rollout_is_the_scheduler_s_own_run():
    batch = {"c": np.zeros(4, np.float32)}
    run = rewards.rollout(predict, PLAN, PARAMS, batch, X, KEY)
    state = (s := scheduler()).init(PLAN, X, KEY)
    for i in range(5):
        np.testing.assert_allclose(run.samples[i], state.sample, rtol=1e-5, atol=1e-5)
        state = s.step(state, predict(PARAMS, state.model_input, jnp.full(4, state.timestep), batch))
    np.testing.assert_allclose(run.samples[5], state.sample, rtol=1e-5, atol=1e-5)
    assert run.log_probs.shape == (5, 4) and np.isfinite(run.log_probs).all()


def test_loss_of_ddpo():
    """PPO's clipped ratio; a network that has not moved has ratio 1, and the gradient of -A log p."""
    batch = {"c": np.linspace(-0.1, 0.1, 4, dtype=np.float32)}
    run = rewards.rollout(predict, PLAN, PARAMS, batch, X, KEY)
    examples = rewards.decisions(run, PLAN, np.float32([3, -1, 9, 0.5]), batch)
    assert {len(v) for v in examples.values()} == {20} and set(examples["row"].tolist()) == set(range(5))
    loss = jax.value_and_grad(rewards.ddpo(predict, PLAN, clip_range=0.01), has_aux=True)
    (value, metrics), slopes = loss(PARAMS, examples, KEY)
    np.testing.assert_allclose(value, -np.mean([3, -1, 5, 0.5]), rtol=1e-4)
    assert float(metrics["approx_kl"]) < 1e-8 and float(metrics["clipfrac"]) == 0

    def policy(params):
        plan = rewards.drawing(PLAN)
        output = predict(params, examples["latents"], jnp.asarray(plan.timesteps)[examples["row"]], examples)
        log_prob = rewards.log_density(
            examples["next"], *rewards.transition(plan, examples["row"], examples["latents"], output)
        )
        return -(jnp.tile(jnp.float32([3, -1, 5, 0.5]), 5) * log_prob).mean()

    np.testing.assert_allclose(slopes["b"], jax.grad(policy)(PARAMS)["b"], rtol=1e-4, atol=1e-7)

    moved = {"a": jnp.float32(0.8), "b": jnp.float32([0.1, -0.2, 0.1])}
    (value, metrics), _ = loss(moved, examples, KEY)
    plan = rewards.drawing(PLAN)
    output = predict(moved, examples["latents"], jnp.asarray(plan.timesteps)[examples["row"]], examples)
    mean, std = rewards.transition(plan, examples["row"], examples["latents"], output)
    change = torch.tensor(np.asarray(rewards.log_density(examples["next"], mean, std) - examples["log_prob"]))
    ratio, a = change.exp(), torch.tile(torch.tensor([3, -1, 5, 0.5]), (5,))
    theirs = torch.maximum(-a * ratio, -a * ratio.clamp(0.99, 1.01)).mean()
    np.testing.assert_allclose(value, theirs, rtol=1e-5)
    np.testing.assert_allclose(metrics["clipfrac"], ((ratio - 1).abs() > 0.01).float().mean())


def test_reward_rises_by_ddpo():
    """Brightness, of which no gradient is told."""
    lift = lambda params, x, t, batch: 0.8 * x + params["b"]
    start = lambda key: jax.random.normal(key, (64, 4, 4, 3))
    sample = jax.jit(lambda params, key: rewards.rollout(lift, PLAN, params, {}, start(key), key))
    grad = jax.jit(jax.grad(lambda params, batch: rewards.ddpo(lift, PLAN, clip_range=0.2)(params, batch, KEY)[0]))
    params, seen = {"b": jnp.zeros(3)}, []
    for n in range(15):
        run = sample(params, jax.random.fold_in(KEY, n))
        bright = run.samples[-1].mean((1, 2, 3))
        seen.append(float(bright.mean()))
        params = descend(params, grad(params, rewards.decisions(run, PLAN, rewards.advantages(bright), {})), 0.05)
    assert seen[-1] > seen[0] + 1 and (np.diff(seen) > 0).all(), seen


def test_advantages_by_prompt():
    prompts = ["cat", "dog", "cat", "dog", "cat"]
    r = np.float32([1, 10, 2, 20, 6])
    ours = rewards.advantages(r, prompts)
    cats = r[[0, 2, 4]]
    np.testing.assert_allclose(ours[[0, 2, 4]], (cats - cats.mean()) / (cats.std() + 1e-6), rtol=1e-5)
    np.testing.assert_allclose(ours[[1, 3]], [-1, 1], rtol=1e-5)
    np.testing.assert_allclose(rewards.advantages(r), (r - r.mean()) / r.std(), rtol=1e-5)


@pytest.mark.parametrize(
    "plan,match",
    [
        (scheduler().plan(5), "draws no noise.*eta=1.0"),
        (DPMSolverMultistepScheduler().plan(5), "look back at earlier ones.*DDIMScheduler"),
    ],
)
def test_plans_without_decisions(plan, match):
    with pytest.raises(ValueError, match=match):
        rewards.ddpo(predict, plan)


# --- DRaFT -----------------------------------------------------------------------------------------------------------


@functools.cache
def pipeline():
    """A U-Net over pixels, and three steps."""
    config = {"sample_size": 8, "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    spec = UNet2DModel.from_config({**config, **kinds})
    pipe = flaxdiff.DDIMPipeline((("unet", spec),), scheduler(prediction_type="sample"))
    params = {"unet": flaxdiff.init(spec, jax.random.key(1))}
    return pipe, params, pipe.prepare_inputs(batch_size=2, num_inference_steps=3)


def brightness(images, inputs):
    return images.mean((1, 2, 3))


@functools.cache
def draft(k):
    return jax.jit(jax.value_and_grad(rewards.draft(pipeline()[0].program, brightness, k), has_aux=True))


def near(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_gradient_through_all_steps_is_that_of_the_loop():
    pipe, params, inputs = pipeline()
    whole = jax.jit(jax.value_and_grad(lambda params: -pipe.generate(params, KEY, inputs).mean((1, 2, 3)).mean()))
    value, slopes = whole(params)
    for k in (3, 5):
        (ours, metrics), grads = draft(k)(params, inputs, KEY)
        np.testing.assert_allclose([ours, metrics["reward"]], [value, -value], rtol=1e-5)
        near(grads, slopes)


def test_gradient_through_the_last_step_alone():
    pipe, params, inputs = pipeline()

    def by_hand(params, fixed):
        conditions, state = pipe.program.begin(fixed, KEY, inputs)
        for _ in range(2):
            state = pipe.program.step(fixed, conditions, state)
        state = pipe.program.step(params, conditions, state)
        return -brightness(pipe.program.decode(params, state.sampler.sample), inputs).mean()

    value, slopes = jax.jit(jax.value_and_grad(by_hand))(params, params)
    (ours, _), grads = draft(1)(params, inputs, KEY)
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    near(grads, slopes)
    with pytest.raises(ValueError, match="k=0"):
        rewards.draft(pipe.program, brightness, 0)


def test_reward_rises_by_draft():
    _, params, inputs = pipeline()
    seen = []
    for _ in range(8):
        (_, metrics), slopes = draft(1)(params, inputs, KEY)
        params = descend(params, slopes, 1e-2)
        seen.append(float(metrics["reward"]))
    assert seen[-1] > seen[0] + 0.1, seen


# --- preferences -----------------------------------------------------------------------------------------------------


def weigh(params, x, t, batch):
    return x @ (params["w"].base + params["w"].down @ params["w"].up if isinstance(params["w"], LoRA) else params["w"])


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_diffusion_dpo_is_the_script_s(loss_type):
    """train_diffusion_dpo.py: a LoRA against its base, the same noise and time for both of a pair."""
    path, rows = noising.path_of(DDPMScheduler(**SD)), np.array([30, 700])
    eps = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    base, down, up = (rng.normal(size=s).astype(np.float32) for s in ((3, 3), (3, 1), (1, 3)))
    ask = lambda params, *args: weigh(params["unet"], *args)
    params = {"unet": {"w": LoRA(jnp.asarray(base), jnp.asarray(down), jnp.asarray(up), jnp.float32(1))}}
    loss = rewards.diffusion_dpo(
        ask, distillation.adapterless(ask), path, beta_dpo=0.7, loss_type=loss_type,
        timesteps=lambda key, batch, n: jnp.asarray(rows), noise=lambda key, shape: jnp.asarray(eps),
    )  # fmt: skip
    (value, metrics), slopes = jax.value_and_grad(loss, has_aux=True)(params, {"latents": X}, KEY)

    x0, noise = torch.tensor(X), torch.tensor(eps).repeat(2, 1, 1, 1)
    noisy = diffusers.DDPMScheduler(**SD).add_noise(x0, noise, torch.tensor(rows).repeat(2))
    w, d, u = torch.tensor(base, requires_grad=True), torch.tensor(down), torch.tensor(up, requires_grad=True)
    each = lambda weight: (noisy @ weight - noise).square().mean((1, 2, 3)).chunk(2)
    (own_w, own_l), (ref_w, ref_l) = each(w + d @ u), each(w.detach())
    logits = (ref_w - ref_l) - (own_w - own_l)
    theirs = {
        "sigmoid": lambda: -torch.nn.functional.logsigmoid(0.7 * logits).mean(),
        "hinge": lambda: torch.relu(1 - 0.7 * logits).mean(),
        "ipo": lambda: ((logits - 1 / (2 * 0.7)) ** 2).mean(),
    }[loss_type]()
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(metrics["implicit_acc"], (logits > 0).float().mean())
    np.testing.assert_allclose(slopes["unet"]["w"].up, u.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slopes["unet"]["w"].base, w.grad, rtol=1e-4, atol=1e-6)  # none from the reference


def test_dpo_learns_what_is_preferred():
    """Bright pictures preferred: the network comes to denoise them better than the reference does, and others worse."""
    path = noising.path_of(DDPMScheduler(**SD, prediction_type="sample"))
    ask = lambda params, x, t, batch: params["own"]["b"] + 0 * x
    loss = rewards.diffusion_dpo(ask, distillation.instead(ask, own="reference"), path, beta_dpo=2.0)
    bright = np.concatenate([np.full((8, 2, 2, 1), 1.0), np.full((8, 2, 2, 1), -1.0)]).astype(np.float32)
    params = {"own": {"b": jnp.float32(0)}, "reference": {"b": jnp.float32(0)}}
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for n in range(20):
        (value, metrics), slopes = grad(params, {"latents": bright}, jax.random.fold_in(KEY, n))
        if n == 0:
            np.testing.assert_allclose(value, np.log(2), rtol=1e-5)
            np.testing.assert_allclose(metrics["implicit_acc"], 0.5)
        params = {**params, "own": {"b": params["own"]["b"] - 0.1 * slopes["own"]["b"]}}
    assert float(metrics["implicit_acc"]) == 1 and float(params["own"]["b"]) > 0.2


@pytest.mark.parametrize(
    "size,options,match", [(3, {}, "batch of 3 is not of pairs"), (4, {"loss_type": "kto"}, "'kto' is not known")]
)
def test_preferences_that_are_none(size, options, match):
    path = noising.path_of(DDPMScheduler())
    with pytest.raises(ValueError, match=match):
        rewards.diffusion_dpo(predict, predict, path, **options)(PARAMS, {"latents": X[:size]}, KEY)
