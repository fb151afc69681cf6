"""Losses against PyTorch: paths, weights and draws of the time elementwise, losses with the scripts' arithmetic."""

import functools
import pathlib
import re
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from diffusers import training_utils

import flaxdiff
from flaxdiff.models.patch_discriminator import NLayerDiscriminator
from flaxdiff.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
)
from flaxdiff.training import adversarial, distillation, losses, noising, rewards, timesteps

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATH = noising.path_of(DDPMScheduler(**SD))
FLOW = noising.path_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
KINDS = ("epsilon", "sample", "v_prediction")
KEY = jax.random.key(0)


def given(rows: np.ndarray) -> timesteps.Timesteps:
    """These rows, whatever the key."""
    return lambda key, batch, n: jnp.asarray(rows)


def latents(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def close(ours, theirs, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-5, atol=atol)


class Seen:
    """A network that keeps what it was given."""

    def __init__(self, output=0.3):
        self.output = output

    def __call__(self, params, x, t, batch):
        self.x, self.t, self.batch = x, t, batch
        return self.output * x


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_path_of_betas(kind):
    theirs = diffusers.DDPMScheduler(**SD, prediction_type=kind)
    path = noising.path_of(DDPMScheduler(**SD, prediction_type=kind))
    x0, eps, t = latents(5, 4, 4, 3), latents(5, 4, 4, 3)[::-1].copy(), np.array([0, 3, 500, 998, 999])
    x, target = path.noised(t, x0, eps)
    a, b, c = map(torch.from_numpy, (x0, eps, t))
    close(x, theirs.add_noise(a, b, c))
    close(target, {"epsilon": b, "sample": a, "v_prediction": theirs.get_velocity(a, b, c)}[kind])
    for ours, truth in zip(path.predicted(t, x, target), (x0, eps)):
        close(ours, truth, 2e-4)  # x_0 from epsilon at t = 999 divides by 0.07
    np.testing.assert_array_equal(path.time[t], t)


@pytest.mark.parametrize("shift,dynamic", [(3.0, False), (3.0, True)])
def test_path_of_a_flow(shift, dynamic):
    """The scripts for SD3 and Flux look σ and t up in a scheduler whose times go down."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    path = noising.path_of(FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic))
    close(path.time, theirs.timesteps.flip(0))
    close(path.sigma, theirs.sigmas.flip(0))
    x0, eps, row = latents(3, 4, 4, 3), latents(3, 4, 4, 3)[::-1].copy(), np.array([0, 400, 999])
    x, target = path.noised(row, x0, eps)
    sigma = theirs.sigmas[999 - row].numpy()[:, None, None, None]
    close(x, (1 - sigma) * x0 + sigma * eps)
    close(target, eps - x0)


def test_paths_of_other_schedulers():
    """Those that sample in other scales are trained as the scripts do, with DDPM's; a solver's flow is a flow."""
    close(noising.path_of(EulerDiscreteScheduler(**SD)).alpha, PATH.alpha)
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    path = noising.path_of(solver)
    close(path.time, FLOW.time)
    assert path.prediction_type == "flow_prediction"
    terminal = noising.path_of(DDIMScheduler(**SD, rescale_betas_zero_snr=True))
    theirs = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    close(terminal.alpha**2, theirs.alphas_cumprod, 1e-6)
    assert terminal.snr[-1] == 0
    with pytest.raises(TypeError, match="KarrasVeScheduler has neither betas nor a flow"):
        noising.path_of(KarrasVeScheduler())


@pytest.mark.parametrize("path", [*(PATH._replace(prediction_type=kind) for kind in KINDS), FLOW])
def test_perfect_prediction_has_no_loss(path):
    """x_t and the target come from the same noise: a predictor that solves for ε exactly is told so."""

    def oracle(params, x, t, batch):
        row = jnp.searchsorted(jnp.asarray(path.time), t)
        alpha, sigma = noising.at(row, x, path.alpha, path.sigma)
        return path.noised(row, batch["latents"], (x - alpha * batch["latents"]) / sigma)[1]

    value, metrics = losses.denoising(oracle, path)({}, {"latents": latents(8, 4, 4, 3)}, KEY)
    assert float(value) < 1e-6 and set(metrics) == {"loss_low", "loss_high"}


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr(kind):
    """The arithmetic of train_text_to_image.py."""
    t = torch.arange(1000)
    snr = training_utils.compute_snr(diffusers.DDPMScheduler(**SD), t)
    least = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0]
    close(noising.min_snr(5.0)(PATH.snr, kind), least / (snr if kind == "epsilon" else snr + 1))


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none", "logit_normal"])
def test_weights_of_sd3(scheme):
    sigma = torch.from_numpy(FLOW.sigma)
    theirs = training_utils.compute_loss_weighting_for_sd3(scheme, sigma)
    np.testing.assert_allclose(noising.weights_of(FLOW, noising.sd3(scheme)), theirs, rtol=1e-6)


WEIGHTS = {
    "min_snr": noising.min_snr(),
    "soft_min_snr": noising.soft_min_snr(),
    "p2": noising.p2(),
    "debiased": noising.debiased(),
    "original": noising.original(),
    "sd3": noising.sd3("cosmap"),
}


def test_formulas_of_weights():
    """As their papers state them."""
    snr = PATH.snr
    formulas = {
        ("min_snr", "sample"): np.minimum(snr, 5),
        ("min_snr", "flow_prediction"): np.minimum(snr, 5) / (1 + snr**0.5) ** 2,
        ("soft_min_snr", "epsilon"): 5 / (snr + 5),
        ("p2", "epsilon"): 1 / (1 + snr),
        ("debiased", "epsilon"): 1 / np.sqrt(snr),
        ("original", "v_prediction"): 1 - PATH.alpha**2,
    }
    for (name, kind), expected in formulas.items():
        np.testing.assert_allclose(WEIGHTS[name](snr, kind), expected, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(noising.p2(0.5, 2.0)(snr, "epsilon"), (2 + snr) ** -0.5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_mean_the_same_for_every_prediction(name):
    """An error in x_0 costs the same, whichever network makes it."""
    x0, eps = latents(4, 2, 2, 3), latents(4, 2, 2, 3)[::-1].copy()
    row, wrong = np.array([1, 300, 600, 990]), x0 + 0.1
    costs = []
    for kind in KINDS:
        path = PATH._replace(prediction_type=kind)
        x, target = path.noised(row, x0, eps)
        alpha, sigma = noising.at(row, x, path.alpha, path.sigma)
        _, output = path.noised(row, wrong, (x - alpha * wrong) / sigma)
        costs.append(noising.weights_of(path, WEIGHTS[name])[row] * losses.squared(output - target))
    np.testing.assert_allclose(costs[0], costs[1], rtol=2e-2)  # ε - ε' is a small difference in float32
    np.testing.assert_allclose(costs[2], costs[1], rtol=2e-2)


def test_weights_at_zero_signal():
    """v and x_0 may be predicted there; ε with a weight that is infinite may not, and the row is named."""
    path = noising.path_of(DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    for weight in (noising.min_snr(), noising.soft_min_snr(), noising.debiased()):
        assert noising.weights_of(path, weight)[-1] < 1e-9
    epsilon = path._replace(prediction_type="epsilon")
    np.testing.assert_allclose(noising.weights_of(epsilon, noising.min_snr())[-1], 1)
    with pytest.raises(ValueError, match="weight of level 999.*predict v, or take min_snr"):
        losses.denoising(Seen(), epsilon, weight=noising.debiased())
    with pytest.raises(ValueError, match="weighting_scheme='cos' is not known.*sigma_sqrt"):
        noising.sd3("cos")


# --- draws of the time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "density,options",
    [
        (timesteps.logit_normal(0.5, 0.8), {"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8}),
        (timesteps.logit_normal(), {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0}),
        (timesteps.mode(1.29), {"weighting_scheme": "mode", "mode_scale": 1.29}),
        (timesteps.uniform, {"weighting_scheme": "none"}),
    ],
)
@pytest.mark.parametrize("stratified", [True, False])
def test_densities_are_those_of_the_scripts(density, options, stratified):
    """Quantiles of the rows; the scripts count levels from the most noise on."""
    n = 100_000
    u = training_utils.compute_density_for_timestep_sampling(
        batch_size=n, generator=torch.Generator().manual_seed(0), **options
    )
    theirs = 999 - np.clip((u.numpy() * 1000).astype(int), 0, 999)
    ours = timesteps.sampler(density, stratified=stratified)(KEY, n, 1000)
    at = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(np.quantile(ours, at), np.quantile(theirs, at), atol=8)


def test_cosmap_is_the_weight_as_a_density():
    """π(σ) = 2 / (π - 2πσ + 2πσ²): the share of draws in each tenth of the schedule."""
    rows = timesteps.sampler(timesteps.cosmap)(KEY, 200_000, 1000)
    edges = np.linspace(0, 1, 11)
    fine = np.linspace(0, 1, 100_001)
    pdf = 2 / (np.pi * (1 - 2 * fine + 2 * fine**2))
    expected = [pdf[(fine >= a) & (fine < b)].mean() / 10 for a, b in zip(edges, edges[1:])]
    np.testing.assert_allclose(np.histogram(rows, 10, (0, 1000))[0] / 200_000, expected, atol=2e-3)


def script_weights(strategy, **options):
    """generate_timestep_weights of train_text_to_image_sdxl.py, in its own words of torch: a slice is multiplied."""
    weights, n = torch.ones(1000), int(options.get("portion", 0.25) * 1000)
    where = {
        "later": slice(-n, None),
        "earlier": slice(0, n),
        "range": slice(options.get("begin"), options.get("end")),
        "none": slice(0, 0),
    }[strategy]
    weights[where] *= options.get("multiplier", 1.0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    "strategy,options",
    [
        ("later", {"multiplier": 3.0, "portion": 0.2}),
        ("earlier", {"multiplier": 0.25, "portion": 0.5}),
        ("range", {"multiplier": 5.0, "begin": 200, "end": 500}),
        ("none", {}),
    ],
)
def test_bias_of_the_times(strategy, options):
    ours = timesteps.timestep_bias(strategy, **options)
    theirs = script_weights(strategy, **options)
    close(ours / ours.sum(), theirs)
    rows = timesteps.sampler(timesteps.weighted(ours), stratified=False)(KEY, 200_000, 1000)
    tenths = np.histogram(rows, 10, (0, 1000))[0] / 200_000
    np.testing.assert_allclose(tenths, theirs.reshape(10, 100).sum(1), atol=4e-3)


def test_rows_of_weight_nothing_are_not_drawn():
    weights = np.zeros(1000)
    weights[[7, 500, 999]] = 1, 2, 1
    rows = timesteps.sampler(timesteps.weighted(weights))(KEY, 4000, 1000)
    counted = dict(zip(*np.unique(rows, return_counts=True)))
    assert set(counted) <= {7, 500, 999} and abs(counted[500] - 2000) < 5


def test_strata_and_bounds():
    rows = timesteps.sampler(min_timestep=200, max_timestep=600)(KEY, 8, 1000)
    np.testing.assert_array_equal(np.sort(np.asarray(rows)) // 50, np.arange(4, 12))
    assert not np.array_equal(rows, np.sort(rows)), "halves of a batch would see halves of the schedule"
    for bad in ({"min_timestep": 600, "max_timestep": 200}, {"max_timestep": 1001}):
        with pytest.raises(ValueError, match="no range within 1000 levels"):
            timesteps.sampler(**bad)(KEY, 8, 1000)


@pytest.mark.parametrize(
    "strategy,options,match",
    [
        ("late", {}, "'late' is not known.*later"),
        ("later", {"multiplier": 0.0}, "multiplier=0.0 must be positive"),
        ("range", {"begin": 500, "end": 200}, "begin=500 and end=200"),
    ],
)
def test_bias_that_is_none(strategy, options, match):
    with pytest.raises(ValueError, match=match):
        timesteps.timestep_bias(strategy, **options)
    with pytest.raises(ValueError, match="not all zero"):
        timesteps.weighted(np.zeros(3))


# --- noise -----------------------------------------------------------------------------------------------------------


def test_offset_noise_is_the_same_at_all_places_of_a_channel():
    """PyTorch's scripts: noise + offset · normal(B, C, 1, 1)."""
    shape = (512, 8, 8, 4)
    plain, offset = jax.random.normal(KEY, shape), noising.offset(0.5)(KEY, shape)
    np.testing.assert_allclose([plain.var(), offset.var()], [1, 1.25], rtol=0.03)
    apart = np.asarray(offset - plain)
    assert np.ptp(apart, axis=(1, 2)).max() < 1e-5 < np.abs(apart).max()


def test_pyramid_noise_has_its_power_in_low_frequencies():
    drawn = noising.pyramid(0.8)(KEY, (64, 16, 16, 2))
    close(drawn.std(), 1)
    means = lambda a: float(np.asarray(a).mean((1, 2)).var())
    assert means(drawn) > 20 * means(jax.random.normal(KEY, drawn.shape))
    close(noising.pyramid(0.0)(KEY, (2, 4, 4, 1)), (n := jax.random.normal(KEY, (2, 4, 4, 1))) / n.std())


def test_input_perturbation_reaches_the_input_alone():
    """train_text_to_image.py: x_t of ε + γ z, the target of ε."""
    net, zeros, rows = Seen(), {"latents": np.zeros((256, 8, 8, 4), np.float32)}, np.full(256, 700)
    value = lambda p: losses.denoising(net, PATH, timesteps=given(rows), input_perturbation=p)({}, zeros, KEY)[0]
    value(0.0)
    plain = net.x
    value(0.1)
    apart = net.x - plain
    np.testing.assert_allclose(apart.std(), 0.1 * PATH.sigma[700], rtol=0.02)
    net.output = 0.0  # what is left of the loss is the target's own variance, ε² = 1
    np.testing.assert_allclose(value(0.5), 1, rtol=0.02)


def test_dream():
    """diffusers' own function: what the second evaluation is given, and no gradient through the first."""
    x0, rows, eps = (
        latents(4, 4, 4, 3),
        np.array([10, 300, 600, 999]),
        lambda key, shape: jnp.asarray(latents(*shape)[::-1]),
    )
    seen = []
    net = lambda params, x, t, batch: (seen.append(x), params["a"] * x)[1]
    loss = losses.denoising(net, PATH, timesteps=given(rows), noise=eps, dream_detail_preservation=0.7)
    (value, _), slope = jax.value_and_grad(loss, has_aux=True)({"a": jnp.float32(0.3)}, {"latents": x0}, KEY)

    scheduler = diffusers.DDPMScheduler(**SD)
    noise, t = peers.nchw(latents(*x0.shape)[::-1].copy()), torch.from_numpy(rows)
    a, noisy = torch.tensor(0.3, requires_grad=True), scheduler.add_noise(peers.nchw(x0), noise, t)
    unet = lambda x, t, text: SimpleNamespace(sample=0.3 * x)
    noisy, target = training_utils.compute_dream_and_update_latents(unet, scheduler, t, noise, noisy, noise, None, 0.7)
    theirs = (a * noisy - target).square().mean()
    theirs.backward()
    close(value, theirs.item())
    close(slope["a"], a.grad)
    assert len(seen) == 2


# --- the whole loss --------------------------------------------------------------------------------------------------


def test_prior_preservation_and_weights_as_in_the_script_for_flux():
    x0, rows = latents(6, 4, 4, 3), np.array([10, 300, 980, 50, 600, 999])
    net, eps = Seen(), lambda key, shape: jnp.asarray(latents(*shape)[::-1])
    options = dict(timesteps=given(rows), noise=eps, weight=noising.sd3("sigma_sqrt"), prior_loss_weight=0.7)
    value, _ = losses.denoising(net, FLOW, **options)({}, {"latents": x0}, KEY)
    close(net.t, FLOW.time[rows])

    sigmas = torch.from_numpy(FLOW.sigma[rows]).float().reshape(-1, 1, 1, 1)
    noise, clean = torch.from_numpy(latents(*x0.shape)[::-1].copy()), torch.from_numpy(x0)
    error = (0.3 * ((1 - sigmas) * clean + sigmas * noise) - (noise - clean)) ** 2
    per = (training_utils.compute_loss_weighting_for_sd3("sigma_sqrt", sigmas) * error).mean((1, 2, 3))
    close(value, per[:3].mean() + 0.7 * per[3:].mean())
    with pytest.raises(ValueError, match="batch of 5 has no halves"):
        losses.denoising(net, FLOW, prior_loss_weight=1.0)({}, {"latents": x0[:5]}, KEY)


def test_mask_counts_places():
    x0 = latents(4, 6, 6, 3)
    mask = np.random.default_rng(1).uniform(size=(4, 6, 6, 1)).astype(np.float32)
    rows, eps = np.array([10, 300, 600, 999]), lambda key, shape: jnp.zeros(shape)
    net = Seen()
    value, _ = losses.denoising(net, PATH, timesteps=given(rows), noise=eps)({}, {"latents": x0, "mask": mask}, KEY)
    error, m = torch.from_numpy(np.array(0.3 * net.x)) ** 2, torch.from_numpy(mask)
    # train_custom_diffusion.py sums channels that its mask does not have: its loss is 3 times this mean over places
    close(value, ((error * m).sum((1, 2, 3)) / m.sum((1, 2, 3))).mean() / 3)
    nothing = losses.squared(jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1)))
    assert float(nothing[0]) == 0


def test_conditions_are_dropped_by_example():
    """InstructPix2Pix: text, picture or both are left out, each in a share p of the examples."""
    n, p = 40_000, 0.05
    batch = {"text": {"a": jnp.ones((n, 3, 2))}, "picture": jnp.ones((n, 2, 2, 1)), "latents": jnp.ones((n, 1))}
    text, picture = losses.three_ways(p, {"a": jnp.full((3, 2), 7.0)}, jnp.zeros((2, 2, 1)))
    seen = {}
    keeps = lambda params, batch, key: (seen.update(batch), (0.0, {}))[1]
    losses.dropping(keeps, {"text": text, "picture": picture})({}, batch, KEY)
    no_text, no_picture = np.asarray(seen["text"]["a"] == 7), np.asarray(seen["picture"] == 0)
    assert (no_text.all((1, 2)) == no_text.any((1, 2))).all(), "an example keeps all of its text or none"
    no_text, no_picture = no_text.all((1, 2)), no_picture.all((1, 2, 3))
    shares = [(no_text & ~no_picture).mean(), (no_text & no_picture).mean(), (~no_text & no_picture).mean()]
    np.testing.assert_allclose(shares, p, atol=0.005)
    np.testing.assert_array_equal(seen["latents"], batch["latents"])

    u = torch.from_numpy(np.linspace(0, 1, 1001))  # the script's masks
    np.testing.assert_array_equal((text.low <= u) & (u < text.high), u < 2 * p)
    np.testing.assert_array_equal((picture.low <= u) & (u < picture.high), (u >= p) & (u < 3 * p))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1/3\]"):
        losses.three_ways(0.5, None, None)


# --- autoencoders and their critics ----------------------------------------------------------------------------------


class TamingDiscriminator(torch.nn.Module):
    """NLayerDiscriminator of taming-transformers, with three layers."""

    def __init__(self, ndf):
        super().__init__()
        layers = [torch.nn.Conv2d(3, ndf, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
        for fan_in, fan_out, stride in ((ndf, 2 * ndf, 2), (2 * ndf, 4 * ndf, 2), (4 * ndf, 8 * ndf, 1)):
            conv = torch.nn.Conv2d(fan_in, fan_out, 4, stride, 1, bias=False)
            layers += [conv, torch.nn.BatchNorm2d(fan_out), torch.nn.LeakyReLU(0.2)]
        self.main = torch.nn.Sequential(*layers, torch.nn.Conv2d(8 * ndf, 1, 4, 1, 1))

    def forward(self, x):
        return self.main(x)


softplus = torch.nn.functional.softplus
CRITICS = {  # taming's losses of the logits of real pictures and of made ones
    "hinge": lambda real, made: 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + made).mean()),
    "vanilla": lambda real, made: 0.5 * (softplus(-real).mean() + softplus(made).mean()),
}


@functools.cache
def discriminators():
    torch.manual_seed(0)
    peer = TamingDiscriminator(4)
    spec = NLayerDiscriminator.from_config({"ndf": 4})
    params = {k: v for k, v in peer.state_dict().items() if "running" not in k and "num_batches" not in k}
    params = {k: jnp.asarray(v.permute(2, 3, 1, 0) if v.ndim == 4 else v) for k, v in params.items()}
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in flaxdiff.abstract(spec).items()}
    return spec, params, peer


def judge(params, image, batch):
    return flaxdiff.apply(discriminators()[0], params["discriminator"], image)


def pixels(n=2, size=32):
    return np.random.default_rng(3).uniform(-1, 1, (n, size, size, 3)).astype(np.float32)


def test_patch_discriminator():
    spec, params, peer = discriminators()
    theirs = peer(peers.nchw(pixels()))
    assert peers.relative(flaxdiff.apply(spec, params, pixels()), peers.nhwc(theirs)) < 1e-5
    half = {name: a.astype(jnp.bfloat16) for name, a in params.items()}  # and pictures as they are
    assert peers.relative(flaxdiff.apply(spec, half, pixels()).astype(jnp.float32), peers.nhwc(theirs)) < 0.1


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_critic(kind):
    """taming's losses, and R1 as the squared norm of the gradient."""
    _, params, peer = discriminators()
    made, real = pixels()[::-1] * 0.5, peers.nchw(pixels()).requires_grad_()
    loss = adversarial.critic(judge, lambda params, batch, key: made, disc_loss=kind, r1=0.1)
    value, _ = loss({"discriminator": params}, {"image": pixels()}, KEY)
    of_real, of_fake = peer(real), peer(peers.nchw(made.copy()))
    theirs = CRITICS[kind](of_real, of_fake)
    (slope,) = torch.autograd.grad(of_real.sum(), real, retain_graph=True)
    close(value, (theirs + 0.1 * slope.square().sum((1, 2, 3)).mean()).item())
    with pytest.raises(ValueError, match="disc_loss='wgan' is not known"):
        adversarial.critic(judge, None, disc_loss="wgan")


def test_autoencoder_against_a_critic(tmp_path):
    """train_autoencoderkl.py without LPIPS, divided by the numbers in a picture."""
    torch.manual_seed(0)
    vae = peers.sure(diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False))
    vae.save_pretrained(tmp_path)
    spec, params = flaxdiff.AutoencoderKL.from_pretrained(tmp_path)
    _, critic, peer = discriminators()
    params, image = {"vae": params, "discriminator": critic}, pixels()
    loss = adversarial.autoencoding(spec, adversarial.gaussian(0.1), judge, rec_loss="l2", disc_scale=0.5)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), slopes = grad(params, {"image": image}, KEY)

    targets, last = peers.nchw(image), vae.decoder.conv_out.weight
    posterior = vae.encode(targets).latent_dist
    made = vae.decode(posterior.mean).sample
    rec, kl = (made - targets).square().sum() / 2, posterior.kl().sum() / 2
    fools = -peer(made).mean()
    norm = lambda of: torch.autograd.grad(of, last, retain_graph=True)[0].norm()
    numbers = image[0].size
    weight = (norm(rec) / numbers) / (norm(fools) + 1e-4)
    theirs = rec / numbers + 0.1 * kl / numbers + 0.5 * weight.detach() * fools
    theirs.backward()
    close(metrics["disc_weight"], 0.5 * weight.item())
    close(value, theirs.item())
    for name in ("encoder.conv_in", "decoder.conv_out"):
        ours, module = slopes["vae"][f"{name}.weight"], vae.get_submodule(name)
        assert peers.relative(ours, module.weight.grad.permute(2, 3, 1, 0)) < 1e-3, name

    plain, _ = adversarial.autoencoding(spec, adversarial.gaussian(0.1), rec_loss="l2")(params, {"image": image}, KEY)
    close(plain, ((rec + 0.1 * kl) / numbers).item())
    made_here = adversarial.remade(spec, adversarial.gaussian())(params, {"image": image}, KEY)
    assert peers.relative(made_here, peers.nhwc(made)) < 1e-4
    with pytest.raises(ValueError, match="rec_loss='lpips' is not known"):
        adversarial.autoencoding(spec, adversarial.gaussian(), rec_loss="lpips")


@pytest.mark.parametrize("legacy", [True, False])
def test_codebook(legacy, tmp_path):
    """VQModel's commit_loss, and where its gradients go: the codebook learns from it alone."""
    torch.manual_seed(0)
    peer = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=24, vq_embed_dim=4).train()
    peer.quantize.legacy = legacy
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.VQModel.from_pretrained(tmp_path)
    image = pixels(2, 8)
    loss = adversarial.autoencoding(spec, adversarial.codebook(legacy=legacy), rec_loss="l2")
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), slopes = grad({"vae": params}, {"image": image}, KEY)
    made, commit = peer(peers.nchw(image), return_dict=False)
    theirs = (made - peers.nchw(image)).square().mean() + commit
    theirs.backward()
    close(metrics["bottleneck"], commit.item())
    close(value, theirs.item())
    assert peers.relative(slopes["vae"]["quantize.embedding.weight"], peer.quantize.embedding.weight.grad) < 1e-3
    there = peer.quant_conv.weight.grad.permute(2, 3, 1, 0)
    assert peers.relative(slopes["vae"]["quant_conv.weight"], there) < 1e-3


def test_page():
    """What docs/losses.md shows runs, and every function that it names is there."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    space = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, space)
    assert np.isfinite(space["value"])
    modules = {m.__name__.split(".")[-1]: m for m in (adversarial, distillation, losses, noising, rewards, timesteps)}
    named = re.findall(rf"`[^`\n]*?\b({'|'.join(modules)})\.(\w+)", page)
    assert len(named) >= 25 and all(hasattr(modules[module], name) for module, name in named)
