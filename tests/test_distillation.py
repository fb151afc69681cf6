"""Distillation against the arithmetic of PyTorch's scripts, and students that find what theory says they should."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flaxdiff import weights
from flaxdiff.schedulers import CMStochasticIterativeScheduler, DDPMScheduler
from flaxdiff.training import adversarial, distillation, noising

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATH = noising.path_of(DDPMScheduler(**SD))
KEY = jax.random.key(0)
rng = np.random.default_rng(0)
X0 = rng.normal(size=(6, 4, 4, 3)).astype(np.float32)
EPS = rng.normal(size=X0.shape).astype(np.float32)
TEXT = rng.normal(size=(6, 5, 2)).astype(np.float32)
EMPTY = rng.normal(size=(5, 2)).astype(np.float32)


def noise(key, shape):
    assert shape == EPS.shape
    return jnp.asarray(EPS)


def given(rows):
    return lambda key, batch, n: jnp.asarray(rows)


def network(cos, column):
    """One formula for both libraries: linear in the sample, and moved by the time, the text and the strength."""

    def net(a, b, x, t, text, strength=None):
        moved = b * cos(column(t) / 300) + 0.1 * column(text.mean((1, 2)))
        return a * x + moved + (0 if strength is None else 0.2 * column(strength.mean(1)))

    return net


OURS = network(jnp.cos, lambda a: jnp.asarray(a, jnp.float32).reshape(-1, 1, 1, 1))
THEIRS = network(torch.cos, lambda a: a.float().reshape(-1, 1, 1, 1))


def predict(params, x, t, batch):
    return OURS(params["unet"]["a"], params["unet"]["b"], x, t, batch["text"], batch.get("timestep_cond"))


def teacher(params, x, t, batch):
    return OURS(params["teacher"]["a"], params["teacher"]["b"], x, t, batch["text"])


PARAMS = {
    "unet": {"a": jnp.float32(0.4), "b": jnp.float32(0.3)},
    "teacher": {"a": jnp.float32(0.5), "b": jnp.float32(0.1)},
}


# --- latent consistency ----------------------------------------------------------------------------------------------


def lcm_of_the_script(kind, index, w, loss_type, embedded):
    """A step of train_lcm_distill_sd_wds.py, with these networks: the loss and its gradients in the student."""
    scheduler = diffusers.DDPMScheduler(**SD)
    power = scheduler.alphas_cumprod
    alphas, sigmas = power.sqrt(), (1 - power).sqrt()
    ddim = (np.arange(1, 51) * 20).round().astype(np.int64) - 1
    previous = torch.tensor([power[0].item()] + power[ddim[:-1]].tolist())
    column = lambda a: a.reshape(-1, 1, 1, 1)

    def predicted(output, t, x):
        alpha, sigma = column(alphas[t]), column(sigmas[t])
        if kind == "epsilon":
            return (x - sigma * output) / alpha, output
        if kind == "sample":
            return output, (x - alpha * output) / sigma
        return alpha * x - sigma * output, alpha * output + sigma * x

    def boundary(t):
        scaled = 10.0 * t
        return column(0.25 / (scaled**2 + 0.25)), column(scaled / (scaled**2 + 0.25) ** 0.5)

    x0, eps, text, empty = map(torch.tensor, (X0, EPS, TEXT, EMPTY))
    start = torch.tensor(ddim)[index]
    end = torch.where(start - 20 < 0, torch.zeros_like(start), start - 20)
    noisy = scheduler.add_noise(x0, eps, start)
    a, b = (torch.tensor(float(PARAMS["unet"][k]), requires_grad=True) for k in "ab")
    ta, tb = (float(PARAMS["teacher"][k]) for k in "ab")
    strength = None
    if embedded:
        omega = torch.exp(torch.arange(4) * -(torch.log(torch.tensor(10000.0)) / 3))
        angle = torch.full((len(x0),), w)[:, None] * 1000.0 * omega
        strength = torch.cat([angle.sin(), angle.cos()], 1)
    pred_x0, _ = predicted(THEIRS(a, b, noisy, start, text, strength), start, noisy)
    skip, out = boundary(start)
    model_pred = skip * noisy + out * pred_x0
    with torch.no_grad():
        c_x0, c_eps = predicted(THEIRS(ta, tb, noisy, start, text), start, noisy)
        u_x0, u_eps = predicted(THEIRS(ta, tb, noisy, start, empty.expand_as(text)), start, noisy)
        x0_hat, eps_hat = c_x0 + w * (c_x0 - u_x0), c_eps + w * (c_eps - u_eps)
        last = column(previous[index])
        x_prev = last.sqrt() * x0_hat + (1 - last).sqrt() * eps_hat
        target_x0, _ = predicted(THEIRS(a, b, x_prev, end, text, strength), end, x_prev)
        skip, out = boundary(end)
        target = skip * x_prev + out * target_x0
    error = model_pred - target
    loss = (error**2).mean() if loss_type == "l2" else (torch.sqrt(error**2 + 0.1**2) - 0.1).mean()
    loss.backward()
    return loss.item(), a.grad.item(), b.grad.item()


@pytest.mark.parametrize(
    "kind,loss_type,embedded", [("epsilon", "huber", True), ("v_prediction", "l2", False), ("sample", "l2", True)]
)
def test_step_of_latent_consistency(kind, loss_type, embedded):
    index = np.array([0, 1, 10, 25, 40, 49])
    loss = distillation.latent_consistency(
        *(predict, teacher, PATH._replace(prediction_type=kind), {"text": EMPTY}),
        **dict(w_min=7.0, w_max=7.0, loss_type=loss_type, huber_c=0.1, timesteps=given(index), noise=noise),
        time_cond_proj_dim=8 if embedded else None,
    )
    grad = jax.value_and_grad(lambda params: loss(params, {"latents": X0, "text": TEXT}, KEY)[0])
    value, slopes = grad(PARAMS)
    theirs = lcm_of_the_script(kind, index, 7.0, loss_type, embedded)
    np.testing.assert_allclose([value, slopes["unet"]["a"], slopes["unet"]["b"]], theirs, rtol=1e-5, atol=1e-6)
    assert not any(map(float, slopes["teacher"].values()))


def test_strength_is_drawn_for_each_example():
    seen = []
    spy = lambda params, x, t, batch: (seen.append(batch.get("timestep_cond")), x)[1]
    loss = distillation.latent_consistency(
        spy, teacher, PATH, {"text": EMPTY}, w_min=0.0, w_max=1e-3, time_cond_proj_dim=8
    )
    loss(PARAMS, {"latents": X0, "text": TEXT}, KEY)
    w = np.arcsin(seen[0][:, 0])  # the first frequency is 1, of thousandths
    assert len(np.unique(w)) == 6 and (0 <= w).all() and (w <= 1).all()
    np.testing.assert_array_equal(seen[0], seen[1])


def test_teacher_of_a_lora_is_its_base():
    base, lora = jnp.eye(3), weights.LoRA(jnp.eye(3), jnp.ones((3, 1)), jnp.ones((1, 3)), jnp.float32(1))
    ask = lambda params, x: weights.dot(x, params["unet"]["w"])
    x = jnp.ones((1, 3))
    params = {"unet": {"w": lora}}
    np.testing.assert_array_equal(ask(params, x), [[4, 4, 4]])
    np.testing.assert_array_equal(distillation.adapterless(ask)(params, x), x @ base)
    slopes = jax.grad(lambda params: distillation.adapterless(ask)(params, x).sum())(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))
    swapped = distillation.instead(ask, unet="teacher")
    np.testing.assert_array_equal(swapped({**params, "teacher": {"w": 2 * base}}, x), [[2, 2, 2]])


def test_guided_teacher():
    ask = distillation.guided(lambda params, x, t, batch: batch["text"].mean((1, 2)), {"text": EMPTY}, 3.0)
    expected = EMPTY.mean() + 3 * (TEXT.mean((1, 2)) - EMPTY.mean())
    np.testing.assert_allclose(ask({}, X0, 0, {"text": TEXT}), expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{"loss_type": "l1"}, {"num_ddim_timesteps": 1001}])
def test_latent_consistency_of_wrong_options(options):
    with pytest.raises(ValueError, match="must be one of .'huber', 'l2'.*≤ 1000"):
        distillation.latent_consistency(predict, teacher, PATH, {}, **options)


# --- consistency training --------------------------------------------------------------------------------------------


def test_step_of_consistency_training():
    """train_cm_ct_unconditional.py with the scalings of diffusers' own scheduler, at whose levels one samples."""
    i = np.array([0, 3, 5, 8, 9, 2])
    ours = CMStochasticIterativeScheduler(num_train_timesteps=11)
    theirs = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=11)
    loss = distillation.consistency(predict, ours, huber_c=0.02, timesteps=given(i), noise=noise)
    value, slopes = jax.value_and_grad(lambda params: loss(params, {"latents": X0, "text": TEXT}, KEY)[0])(PARAMS)

    sigmas = theirs._convert_to_karras(np.linspace(0, 1, 11))[::-1].copy()
    x0, eps, text = map(torch.tensor, (X0, EPS, TEXT))
    a, b = (torch.tensor(float(PARAMS["unet"][k]), requires_grad=True) for k in "ab")
    column = lambda v: torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1, 1)

    def denoised(sigma):
        skip, out = theirs.get_scalings_for_boundary_condition(sigma)
        x = x0 + column(sigma) * eps
        output = THEIRS(a, b, x / column((sigma**2 + 0.25) ** 0.5), torch.tensor(theirs.sigma_to_t(sigma)), text)
        return column(skip) * x + column(out) * output

    low, high = sigmas[i], sigmas[i + 1]
    error = denoised(high) - denoised(low).detach()
    there = ((torch.sqrt(error**2 + 0.02**2) - 0.02) * column(1 / (high - low))).mean()
    there.backward()
    np.testing.assert_allclose([value, *slopes["unet"].values()], [there.item(), a.grad, b.grad], rtol=2e-5)


def test_levels_of_consistency_training():
    sigma = CMStochasticIterativeScheduler(num_train_timesteps=41).train_sigmas()
    edges = torch.special.erf((torch.tensor(np.log(sigma)) + 1.1) / (2**0.5 * 2.0))
    np.testing.assert_allclose(distillation.lognormal(sigma), edges[1:] - edges[:-1], rtol=1e-9)
    counts = [distillation.discretization(k, 800_000) for k in (0, 99_999, 100_000, 799_999)]
    assert counts == [11, 11, 21, 1281]
    drawn = []
    spy = lambda params, x, t, batch: (drawn.append(t), x)[1]
    distillation.consistency(spy, CMStochasticIterativeScheduler(num_train_timesteps=41))(
        {}, {"latents": np.zeros((2000, 2))}, KEY
    )
    shares = np.histogram(np.searchsorted(250 * np.log(sigma), np.asarray(drawn[0]) - 1e-2), 40, (0, 40))[0] / 2000
    masses = distillation.lognormal(sigma)
    np.testing.assert_allclose(shares, masses / masses.sum(), atol=2e-3)


# --- one step by a score or an adversary -----------------------------------------------------------------------------


def gaussian(mean, path=PATH, deviation=0.5):
    """ε as the best network for data N(mean, deviation²) says it; `mean` of the parameters."""

    def ask(params, x, t, batch):
        alpha, sigma = noising.at(t, x, path.alpha, path.sigma)
        m, v = mean(params), deviation**2
        x0 = m + v * alpha / (alpha**2 * v + sigma**2) * (x - alpha * m)
        return (x - alpha * x0) / sigma

    return ask


def test_matched_distributions():
    """The generator's samples go where the teacher's are; at the end nothing pulls any more."""
    generate = lambda params, batch, key: params["m"] + 0.5 * jax.random.normal(key, (64, 2, 2, 1))
    fake = gaussian(lambda params: jax.lax.stop_gradient(params["m"]))
    loss = distillation.distribution_matching(generate, gaussian(lambda params: 2.0), fake, PATH)
    step = jax.jit(jax.value_and_grad(lambda params, key: loss(params, {}, key), has_aux=True))
    params, seen = {"m": jnp.float32(-1)}, []
    for n in range(60):
        (_, metrics), slope = step(params, jax.random.fold_in(KEY, n))
        params = {"m": params["m"] - 0.5 * slope["m"]}
        seen.append(float(metrics["gradient"]))
    assert abs(float(params["m"]) - 2) < 0.05 and seen[-1] < 0.05 * seen[0], (params, seen[::20])


def test_gradient_of_matched_distributions():
    """Equation 7 in x_0: (x̂_fake - x̂_real) / mean |x - x̂_real|, which the sample is moved by, and nothing else."""
    names = ("real", "fake")
    ask = {name: lambda params, x, t, batch, name=name: params[name] * x for name in names}
    path = PATH._replace(prediction_type="sample")
    params = {"real": jnp.float32(0.3), "fake": jnp.float32(0.7), "x": jnp.asarray(X0)}
    generate = lambda params, batch, key: params["x"]
    loss = distillation.distribution_matching(
        generate, ask["real"], ask["fake"], path, timesteps=given(np.arange(6) * 100 + 50)
    )
    slopes = jax.grad(lambda params: loss(params, {}, KEY)[0])(params)
    x_t, _ = path.noised(jnp.arange(6) * 100 + 50, X0, jax.random.normal(jax.random.split(KEY, 3)[2], X0.shape))
    g = (0.7 - 0.3) * x_t / np.abs(X0 - 0.3 * x_t).mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(slopes["x"], g / X0.size, rtol=1e-4, atol=1e-7)
    assert float(slopes["real"]) == float(slopes["fake"]) == 0


def test_network_that_follows_a_generator():
    """It is trained on what the generator makes, whose parameters get no gradient."""
    seen = []
    spy = lambda params, x, t, batch: (seen.append(batch["latents"]), params["a"] * x)[1]
    generate = lambda params, batch, key: params["g"] + 0 * batch["latents"]
    loss = distillation.following(spy, generate, PATH, weight=noising.min_snr())
    slopes = jax.grad(lambda params: loss(params, {"latents": X0}, KEY)[0])({"a": jnp.float32(1), "g": jnp.float32(7)})
    np.testing.assert_array_equal(seen[0], np.full_like(X0, 7))
    assert float(slopes["g"]) == 0 and float(slopes["a"]) != 0


def test_one_evaluation_and_few_rows():
    told = []
    ask = lambda params, x, t, batch: (told.append((x, np.asarray(t))), 0.5 * x)[1]
    one = distillation.one_step(ask, PATH)({}, {"latents": X0}, KEY)
    alpha, sigma = PATH.alpha[-1], PATH.sigma[-1]
    np.testing.assert_allclose(one, (told[0][0] - sigma * 0.5 * told[0][0]) / alpha, rtol=1e-5)
    np.testing.assert_array_equal(told[0][1], [999] * 6)
    many = np.tile(X0, (50, 1, 1, 1))
    distillation.diffused(ask, PATH)({}, {"latents": many}, KEY)
    assert set(told[1][1]) == {249, 499, 749, 999}
    x, t = told[1]
    close_by = np.abs(x - noising.at(t, x, PATH.alpha)[0] * many).std((1, 2, 3))
    assert close_by[t == 999].mean() > close_by[t == 249].mean()


def test_adversarial_distillation():
    """Equations 1 and 4: the adversary, and the squared distance to the teacher times α_t."""
    rows = np.array([0, 100, 300, 500, 800, 999])
    path = PATH._replace(prediction_type="sample")
    params = {"x": jnp.asarray(X0), "t": jnp.float32(0.8), "d": jnp.float32(0.3)}
    judge = lambda params, x, batch: params["d"] * x.mean((1, 2, 3))
    ask = lambda params, x, t, batch: params["t"] * x
    loss = distillation.adversarial_distillation(
        lambda params, batch, key: params["x"], ask, judge, path, distillation_weight=2.0, timesteps=given(rows)
    )
    (value, metrics), slopes = jax.value_and_grad(loss, has_aux=True)(params, {}, KEY)
    x_t, _ = path.noised(rows, X0, jax.random.normal(jax.random.split(KEY, 3)[2], X0.shape))
    x, alpha = torch.tensor(X0, requires_grad=True), torch.tensor(path.alpha[rows], dtype=torch.float32)
    apart = (alpha.reshape(-1, 1, 1, 1) * (x - 0.8 * torch.tensor(np.asarray(x_t))) ** 2).mean()
    theirs = -0.3 * x.mean() + 2 * apart
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["distillation"], apart.item(), rtol=1e-5)
    np.testing.assert_allclose(slopes["x"], x.grad, rtol=1e-4, atol=1e-7)
    assert float(slopes["t"]) == 0


def test_student_and_critic_in_turns():
    """Real samples lie at 1; the student, which begins at -1, is led there by the critic alone."""
    real, path = jnp.ones((32, 1)), PATH._replace(prediction_type="sample")
    generate = lambda params, batch, key: params["m"] + 0.2 * jax.random.normal(key, (32, 1))
    judge = lambda params, x, batch: params["w"] * x + params["c"]
    idle = lambda params, x, t, batch: x
    student = distillation.adversarial_distillation(generate, idle, judge, path, distillation_weight=0.0)
    critic = adversarial.critic(judge, generate, "latents", r1=0.5)
    slopes = jax.jit(jax.grad(lambda params, key: student(params, {"latents": real}, key)[0]))
    critics = jax.jit(jax.grad(lambda params, key: critic(params, {"latents": real}, key)[0]))
    params = {"m": jnp.float32(-1), "w": jnp.float32(0), "c": jnp.float32(0)}
    means = []
    for n in range(300):
        key = jax.random.fold_in(KEY, n)
        g = critics(params, key)
        params |= {k: params[k] - 0.2 * g[k] for k in "wc"}
        params |= {"m": params["m"] - 0.1 * slopes(params, key)["m"]}
        means.append(float(params["m"]))
    assert abs(np.mean(means[-50:]) - 1) < 0.2, means[::30]


@pytest.mark.parametrize("whole", [False, True])
def test_distilled_student_needs_one_step(whole):
    """A student that is its teacher's ODE solved exactly has no loss: the consistency function of Gaussian data."""
    deviation = 0.5
    path = PATH._replace(prediction_type="sample")

    def solved(params, x, t, batch):
        """x_0 at the end of the ODE through (x, t), as data N(0, s²) has it, for the boundary scalings to keep."""
        alpha, sigma = noising.at(t, x, path.alpha, path.sigma)
        level = lambda a, s: jnp.sqrt(a**2 * deviation**2 + s**2)
        return x / level(alpha, sigma) * deviation

    best = gaussian(lambda params: 0.0, PATH, deviation)
    ask = lambda params, x, t, batch: PATH.predicted(t, x, best(params, x, t, batch))[0]
    options = {"num_ddim_timesteps": 500, "w_min": 0.0, "w_max": 0.0, "whole": whole}
    batch = {"latents": deviation * rng.normal(size=(64, 4, 4, 3)).astype(np.float32)}
    losses = [distillation.latent_consistency(student, ask, path, {}, **options) for student in (solved, ask)]
    right, other = (float(jax.jit(loss)({}, batch, KEY)[0]) for loss in losses)
    assert right < 1e-4 and right < 0.05 * other, (right, other)
