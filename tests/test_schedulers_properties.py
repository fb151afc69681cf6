"""Properties of the schedulers by list: order of convergence, exact denoising; names; and those that are no tables."""

import math
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_schedulers as parity
import torch
from test_schedulers import CASES, LATENTS, MIX, NOISE, SHAPE, swap

import flaxdiff
from flaxdiff import schedulers
from flaxdiff.schedulers import exponential, path, solvers, tables

pytestmark = parity.pytestmark
back = lambda x: np.moveaxis(x.numpy(), 1, -1)

# --- order of convergence --------------------------------------------------------------------------------------------

# Data N(0.5, 0.3^2): the exact denoiser and the exact path of the probability-flow ODE are known.
MEAN, STD = 0.5, 0.3


def line(n, exploding=False):
    lam = np.linspace(-2, 1.5, n + 1)
    alpha = np.ones(n + 1) if exploding else 1 / np.sqrt(1 + np.exp(-2 * lam))
    return path.chain(np.arange(n)[::-1], alpha, alpha * np.exp(-lam))


def two_rows(n, second):
    """A grid of two evaluations a step; `second` maps (sigma, sigma_to) to where the second is made."""
    g = line(n, exploding=True)
    sigma, to = g.sigma.repeat(2)[:-1], g.sigma_to.repeat(2)[:-1]
    sigma[1::2] = second(g.sigma, g.sigma_to)[:-1]
    one = np.ones_like(sigma)
    return path.Grid(sigma, one, sigma, one, to)


def midpoint(n, data):
    g = two_rows(n, lambda a, b: np.sqrt(a * b))
    down = g.sigma_to.copy()
    down[:-1:2] = g.sigma[1::2]
    return g, solvers.two_stage(g, down, 0 * down, data=data)


def multistep(order, kind, heun=False, exact=False):
    def make(n):
        g = line(n)
        return g, exponential.dpm_multistep(g, order, kind, heun, [order] * n, exact=exact)

    return make


def singlestep(order, kind, heun=False):
    def make(n):
        n = n // order * order
        g = line(n)
        return g, exponential.dpm_singlestep(g, kind, heun, list(range(1, order + 1)) * (n // order))

    return make


def on_line(solver, exploding=False):
    def make(n):
        g = line(n, exploding)
        return g, solver(g)

    return make


def fast(n):
    s = schedulers.DPMSolverFastScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    g = s.grid(3 * n + 2, {})
    return g, s.solver(g, 3 * n + 2)


def pseudo(n):
    """PNDM on the same line: n steps of two units of time, the first three by Runge-Kutta."""
    lam = lambda t: 1.5 - 3.5 * np.asarray(t) / (2 * n)
    alpha, sigma = (lambda t: 1 / np.sqrt(1 + np.exp(-2 * lam(t)))), (lambda t: 1 / np.sqrt(1 + np.exp(2 * lam(t))))
    t = np.arange(2 * n, 0, -2)
    warm_up = np.concatenate([[a, b + 1, b + 1, b] for a, b in zip(t[:3], t[1:4])])
    t = np.concatenate([warm_up, t[3:]])
    across = lambda t, to: (sigma(to) / sigma(t), alpha(to) - alpha(t) * sigma(to) / sigma(t))  # the network gives x_0
    g = path.Grid(t.astype(float), alpha(t), sigma(t), alpha(t - 2), sigma(t - 2))
    return g, solvers.pndm(across, t, 2, warm_up)


def adams(predictor, corrector, data):
    """SA-Solver without its noise."""
    caps = lambda g, order: flat(len(g.t), order)
    return on_line(lambda g: exponential.sa_solver(g, caps(g, predictor), caps(g, corrector), lambda t: 0.0, data))


flat = lambda n, order: [order] * n
ORDERS = [
    ("DDIM", on_line(lambda g: solvers.ddim(g, 0 * g.sigma)), 1),
    (
        "Euler",
        on_line(lambda g: solvers.euler(g, 0 * g.sigma, 1.0, path.prediction("sample", g.alpha, g.sigma)), True),
        1,
    ),
    ("DPM-Solver++ 1", multistep(1, "dpmsolver++"), 1),
    ("DPM-Solver++ 2M", multistep(2, "dpmsolver++"), 2),
    ("DPM-Solver++ 2M heun", multistep(2, "dpmsolver++", True), 2),
    ("DPM-Solver 2M", multistep(2, "dpmsolver"), 2),
    ("DPM-Solver 2M heun", multistep(2, "dpmsolver", True), 2),
    # The published multistep of order 3 takes half of the parabola's integral, and diffusers with it: it gains a
    # constant over order 2, not an order.
    ("DPM-Solver++ 3M", multistep(3, "dpmsolver++"), 2),
    ("DPM-Solver 3M", multistep(3, "dpmsolver"), 2),
    ("DEIS 2", multistep(2, "dpmsolver", True, True), 2),
    ("DEIS 3", multistep(3, "dpmsolver", True, True), 3),
    ("DPM-Solver++ 2S", singlestep(2, "dpmsolver++"), 2),
    ("DPM-Solver++ 3S", singlestep(3, "dpmsolver++"), 3),
    ("DPM-Solver 3S heun", singlestep(3, "dpmsolver", True), 3),
    ("UniPC 1", on_line(lambda g: exponential.unipc(g, flat(len(g.t), 1), True, False)), 2),
    ("UniP 2", on_line(lambda g: exponential.unipc(g, flat(len(g.t), 2), True, False, range(10**6))), 2),
    ("UniPC 2", on_line(lambda g: exponential.unipc(g, flat(len(g.t), 2), True, False)), 3),
    ("UniP 3 bh1", on_line(lambda g: exponential.unipc(g, flat(len(g.t), 3), True, True, range(10**6))), 3),
    ("Heun", lambda n: (lambda g: (g, solvers.heun(g, 0 * g.sigma)))(two_rows(n, lambda a, b: b)), 2),
    ("DPM2", lambda n: midpoint(n, data=False), 2),
    ("DPM++ 2S", lambda n: midpoint(n, data=True), 2),
    ("LMS 2", on_line(lambda g: solvers.lms(g, 2), True), 2),
    ("LMS 3", on_line(lambda g: solvers.lms(g, 3), True), 3),
    ("DPM fast", fast, 3),
    ("SA-Solver 1", adams(1, 0, True), 1),
    ("SA-Solver 1 on eps", adams(1, 0, False), 1),
    ("SA-Solver 2", adams(2, 2, True), 2),
    ("SA-Solver 2 on eps", adams(2, 2, False), 2),
    # weights of order 4, of which the nonlinear transfer keeps 2, as the paper proves
    ("PNDM", pseudo, 2),
    ("IPNDM", on_line(solvers.ipndm), 2),
]


def error(make, n):
    """Distance from the exact path where a run of about n steps ends, in float64, and its number of steps.

    Multistep methods are given exact samples for the rows in which they have no history yet.
    """
    g, step = make(n)
    spread = lambda alpha, sigma: np.sqrt((alpha * STD) ** 2 + sigma**2)
    exact = lambda alpha, sigma: np.array([alpha * MEAN + spread(alpha, sigma)])
    slots = [exact(g.alpha[0], g.sigma[0])] + [np.zeros(1)] * (tables.SLOTS - 1)
    for i in range(len(g.t)):
        x, a, s = slots[0], g.alpha[i], g.sigma[i]
        x0 = MEAN + STD**2 * a / spread(a, s) ** 2 * (x - a * MEAN)
        new = list(step(i, i, slots, tables.Pred(x0, (x - a * x0) / s, x0), np.zeros(1)))
        if i < 3 and len(g.t) == n:
            new[0] = exact(g.alpha_to[i], g.sigma_to[i])
        slots = new + [np.zeros(1)] * (tables.SLOTS - len(new))
    return abs(slots[0] - exact(g.alpha_to[-1], g.sigma_to[-1]))[0], len(g.t)


@pytest.mark.parametrize("name, make, order", ORDERS, ids=[name for name, *_ in ORDERS])
def test_order_of_convergence(name, make, order):
    two_terms_cancel = name.startswith("DPM-Solver++")  # until the steps are very small
    sizes = (1536, 3072, 6144) if two_terms_cancel else (48, 96, 192)
    errors, steps = zip(*(error(make, n) for n in sizes))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.3, f"{slope:.2f} for {order}"


# --- zero noise ------------------------------------------------------------------------------------------------------

# These end at the least noise of their schedule: what remains of it, relative to an image of size 1.
LEFT = {"DEISMultistepScheduler": 0.05, "SASolverScheduler": 0.05, "PNDMScheduler": 0.05, "TCDScheduler": 0.15}
LEFT |= {"DDPMWuerstchenScheduler": 0.05, "CMStochasticIterativeScheduler": 0.01, "DPMSolverFastScheduler": 0.1}
UPWARD = {"DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"}  # they end in noise
# IPNDM starts where alpha = 0 and takes 0 / alpha for 0 there, as diffusers does: no prediction of x_0 can be heard.


@pytest.mark.parametrize("name", sorted(set(CASES) - UPWARD - {"IPNDMScheduler"}) + ["DPMSolverFastScheduler"])
def test_noise_then_exact_denoiser_is_the_identity(name):
    s = getattr(schedulers, name)(**parity.split(CASES.get(name, [{}])[0])[0])
    n = 2 if name == "ConsistencyDecoderScheduler" else 8
    # PNDM counts evaluations from where it begins, as diffusers does: begun in the middle, where no time stands twice,
    # its second evaluation redoes the first step all the same, and the run ends a step above the image
    for partial in ({},) if name == "PNDMScheduler" else ({}, {"strength": 0.5}):
        plan = s.plan(n, **partial)
        image = 0.5 * np.tanh(LATENTS)
        state = s.init(plan, plan.alpha[0] * image + plan.sigma[0] * NOISE[0], jax.random.key(0))
        for i in range(int(plan.steps)):
            output = (image - plan.x0_sample[i] * np.asarray(state.sample)) / plan.x0_output[i]
            state = tables.step(state, output.astype(np.float32))
        np.testing.assert_allclose(state.sample, image, atol=max(3 * LEFT.get(name, 0), 1e-3))


def test_unipc_bh1_reaches_zero_noise():
    # diffusers 0.42.1 multiplies infinity by zero in the last step, and returns NaN
    config = {**parity.SD, "solver_type": "bh1"}
    theirs = diffusers.UniPCMultistepScheduler(**config)
    plan = schedulers.UniPCMultistepScheduler(**config).plan(10)
    theirs.set_timesteps(10)
    assert np.isnan(parity.reference(theirs, plan)).all() and np.isfinite(parity.run(plan)).all()
    # but for that step they agree
    np.testing.assert_array_equal(plan.mix[-1, 0, 5:], [1, 0, 0])
    config["final_sigmas_type"] = "sigma_min"
    theirs = diffusers.UniPCMultistepScheduler(**config)
    theirs.set_timesteps(10)
    parity.agree(schedulers.UniPCMultistepScheduler(**config).plan(10), parity.reference(theirs, plan))


def test_edm_s_exponential_sigmas_begin_at_the_top():
    # diffusers 0.42.1 begins a run of one step at sigma_min
    theirs = diffusers.EDMEulerScheduler(sigma_schedule="exponential")
    theirs.set_timesteps(1)
    assert math.isclose(float(theirs.sigmas[0]), 0.002, rel_tol=1e-6)
    assert schedulers.EDMEulerScheduler(sigma_schedule="exponential").plan(1).sigma[0] == 80


def test_snr():
    ddpm = diffusers.DDPMScheduler()
    t = np.array([0, 10, 500, 999])
    want = ddpm.alphas_cumprod[t] / (1 - ddpm.alphas_cumprod[t])
    np.testing.assert_allclose(schedulers.DDPMScheduler().snr(t), want, rtol=2e-3)
    np.testing.assert_allclose(schedulers.EulerDiscreteScheduler().snr(t), want, rtol=2e-3)
    flow = schedulers.FlowMatchEulerDiscreteScheduler()
    np.testing.assert_allclose(flow.snr(np.array([250.0, 500.0])), [9.0, 1.0], rtol=1e-5)
    noisy = flow.add_noise(jnp.asarray(LATENTS), jnp.asarray(NOISE[0]), jnp.array([250.0, 500.0]))
    np.testing.assert_allclose(noisy[1], 0.5 * LATENTS[1] + 0.5 * NOISE[0][1], atol=1e-6)


# --- names -----------------------------------------------------------------------------------------------------------

DOCUMENTED = [  # diffusers' own table of A1111 names
    ("DPM++ 2M", "DPMSolverMultistepScheduler", {}),
    ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPM++ SDE", "DPMSolverSinglestepScheduler", {}),
    ("DPM++ SDE Karras", "DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
    ("DPM2 Karras", "KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    ("Euler", "EulerDiscreteScheduler", {}),
    ("Euler a", "EulerAncestralDiscreteScheduler", {}),
    ("Heun", "HeunDiscreteScheduler", {}),
    ("LMS", "LMSDiscreteScheduler", {}),
    ("LMS Karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("euler sgm_uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("Euler simple", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("DPM++ 2M exponential", "DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DPM++ 2M beta", "DPMSolverMultistepScheduler", {"use_beta_sigmas": True, "timestep_spacing": "linspace"}),
]


@pytest.mark.parametrize("name, cls, options", DOCUMENTED, ids=[name for name, *_ in DOCUMENTED])
def test_names(name, cls, options):
    pndm = schedulers.PNDMScheduler(**parity.SD)
    got = schedulers.scheduler(name, pndm)
    assert got == getattr(schedulers, cls)(**parity.SD, **options)


def test_ays_schedules():
    assert {k: list(v) for k, v in schedulers.AysSchedules.items()} == diffusers.schedulers.AysSchedules
    plan = schedulers.EulerDiscreteScheduler().plan(timesteps=schedulers.AysSchedules["StableDiffusionTimesteps"])
    assert int(plan.steps) == 10


def loop(s, plan, network):
    state = s.init(plan, LATENTS * plan.init_noise_sigma, jax.random.key(0))
    for i in range(int(plan.steps)):
        state = s.step(state, network(state.model_input, state.timestep), NOISE[i])
    return np.asarray(state.sample)


def test_dpm_2s_ancestral_as_published():
    # k-diffusion's sampler written out, in x_0 and -log sigma
    s = schedulers.scheduler("DPM++ 2S a", **parity.SD)
    plan = s.plan(6)
    network = lambda x, t: jnp.tanh(x @ MIX)
    sigma = [*(float(v) for v in plan.sigma[::2]), 0.0]
    denoise = lambda x, s: x - s * np.asarray(network(x / math.hypot(s, 1), 0))
    x, draws = LATENTS * sigma[0], iter(NOISE[1::2])
    for now, to in zip(sigma, sigma[1:]):
        up = to * math.sqrt(1 - to**2 / now**2)
        down = math.sqrt(to**2 - up**2)
        x0 = denoise(x, now)
        if down > 0:
            middle = math.sqrt(now * down)
            x0 = denoise(middle / now * x + (1 - middle / now) * x0, middle)
        x = down / now * x + (1 - down / now) * x0
        x = x + up * next(draws) if up else x
    np.testing.assert_allclose(loop(s, plan, network), x, atol=1e-4 * np.abs(x).max())


def test_dpm_adaptive_finds_the_exact_solution():
    s = schedulers.scheduler("DPM adaptive", **parity.SD, prediction_type="sample")
    train = jnp.asarray(s.train_sigmas(), jnp.float32)

    def network(x, t):  # data N(0.5, 0.3^2)
        sigma = jnp.interp(t, jnp.arange(len(train), dtype=jnp.float32), train)
        x = x * jnp.sqrt(1 + sigma**2)
        return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)

    top, end = float(train[-1]), float(train[0])
    want = MEAN + math.sqrt(STD**2 + end**2) / math.sqrt(STD**2 + top**2) * (top * LATENTS - MEAN)
    # the tolerance is for one step; over a run the errors add
    loose, tight = (s.solve(network, LATENTS, rtol=r, atol=r / 10) for r in (0.05, 0.0003))
    errors = [np.abs(got.sample - want).max() for got in (loose, tight)]
    assert errors[1] < 2e-3 < 0.05 and errors[1] < errors[0] < 0.1
    assert 3 * loose.accepted <= loose.evaluations < tight.evaluations < 600
    assert s.solve(network, LATENTS, max_steps=2).evaluations == 6


def quick(*counts):
    """Step counts, of which the quick run leaves out those over 2."""
    return [pytest.param(n, marks=pytest.mark.slow if n > 2 else ()) for n in counts]


# --- not tables ------------------------------------------------------------------------------------------------------


def toy(x, t):
    return np.tanh(np.asarray(x) @ MIX + math.sin(float(t) / 100)).astype(np.float32)


LONG = [pytest.param(n, (10, 2), marks=pytest.mark.slow) for n in (25, 50)]


class Draws:
    """Stands for randn_tensor in a diffusers module: hands out what it is given."""

    def __init__(self, monkeypatch, cls):
        monkeypatch.setattr(sys.modules[cls.__module__], "randn_tensor", lambda *args, **kwargs: self.next.pop(0))


@pytest.mark.parametrize(
    "config",
    [{}, {"eta": 0.7}, {"clip_sample": False}, {"beta_schedule": "squaredcos_cap_v2"}, {**parity.SD, "eta": 1.0}]
    + [{"beta_schedule": "sigmoid", "clip_sample": False}, {"beta_start": 1e-3, "beta_end": 0.01}],
    ids=str,
)
@pytest.mark.parametrize("n, jumps", [(1, (10, 10)), (2, (1, 3)), (4, (1, 2)), (10, (2, 3)), *LONG])
def test_repaint_as_diffusers(monkeypatch, config, n, jumps):
    theirs = diffusers.RePaintScheduler(**config)
    theirs.set_timesteps(n, *jumps)
    s = schedulers.RePaintScheduler(**config)
    plan = s.plan(n, jump_length=jumps[0], jump_n_sample=jumps[1])
    noise = np.random.default_rng(1).standard_normal((int(plan.steps), 2, *SHAPE)).astype(np.float32)
    image, mask = np.tanh(LATENTS), (LATENTS[..., :1] > 0).astype(np.float32)
    draws, state = Draws(monkeypatch, diffusers.RePaintScheduler), s.init(plan, LATENTS, jax.random.key(0), image, mask)
    x, last, i = swap(LATENTS), theirs.timesteps[0] + 1, -1
    for t in theirs.timesteps:
        if t < last:
            i += 1
            assert float(state.timestep) == float(t)
            state = s.step(state, toy(state.model_input, t), tuple(noise[i]))
            draws.next, kept = [swap(noise[i, 0])], 1.0
            x = theirs.step(swap(toy(back(x), t)), t, x, swap(image), swap(mask)).prev_sample
        else:
            # many small noises there, one here: the first of ours must come to as much as all of theirs
            zeros = [torch.zeros_like(x)] * (1000 // n)
            draws.next, unit = list(zeros), torch.ones_like(x)
            x = theirs.undo_step(x, last)
            draws.next = list(zeros)
            kept = kept * float(theirs.undo_step(unit, last).flatten()[0])
            if i + 1 < len(plan.keep) and math.isclose(kept, plan.keep[i], rel_tol=1e-5):
                x = x + math.sqrt(1 - kept**2) * swap(noise[i, 1])
        last = t
    want = back(x)
    assert i + 1 == plan.steps
    np.testing.assert_allclose(state.sample, want, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("n", quick(2, 4, 10, 25, 50))
@pytest.mark.parametrize(
    "config",
    [{}, {"snr": 0.3}, {"correct_steps": 2}, {"sigma_max": 50.0}, {"correct_steps": 0}, {"sampling_eps": 1e-2}]
    + [{"sigma_min": 0.1, "snr": 0.05, "correct_steps": 3}],
    ids=str,
)
def test_score_sde_ve_as_diffusers(monkeypatch, config, n):
    theirs = diffusers.ScoreSdeVeScheduler(**config)
    theirs.set_timesteps(n)
    theirs.set_sigmas(n)
    s = schedulers.ScoreSdeVeScheduler(**config)
    plan = s.plan(n)
    state = s.init(plan, LATENTS * plan.init_noise_sigma, jax.random.key(0))
    draws, x, k = Draws(monkeypatch, diffusers.ScoreSdeVeScheduler), swap(LATENTS) * theirs.init_noise_sigma, 0
    score = lambda x, t: -np.asarray(x) / (1 + t**2) * (1 + 0.1 * toy(x, 0))
    for t, sigma in zip(theirs.timesteps, theirs.sigmas):
        for correct in (*[True] * theirs.config.correct_steps, False):
            np.testing.assert_allclose(state.timestep, sigma, rtol=1e-4)
            z = NOISE[k % len(NOISE)]
            draws.next, y = [swap(z)], swap(score(back(x), float(sigma)))
            state = s.step(state, score(state.model_input, float(sigma)), z)
            out = theirs.step_correct(y, x) if correct else theirs.step_pred(y, t, x)
            x, k = out.prev_sample, k + 1
    want = back(out.prev_sample_mean)  # what the pipeline returns
    np.testing.assert_allclose(state.sample, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("n", quick(1, 2, 4, 10, 25, 50))
@pytest.mark.parametrize(
    "config",
    [{}, {"beta_max": 10.0}, {"beta_min": 0.5}, {"sampling_eps": 0.01}, {"num_train_timesteps": 1000}]
    + [{"beta_min": 1.0, "beta_max": 5.0}, {"beta_max": 15.0, "sampling_eps": 0.1}],
    ids=str,
)
def test_score_sde_vp_as_diffusers(monkeypatch, config, n):
    from diffusers.schedulers.deprecated import ScoreSdeVpScheduler

    theirs, s = ScoreSdeVpScheduler(**config), schedulers.ScoreSdeVpScheduler(**config)
    theirs.set_timesteps(n)
    plan = s.plan(n)
    draws, x = Draws(monkeypatch, ScoreSdeVpScheduler), swap(LATENTS)
    for k, t in enumerate(theirs.timesteps):
        draws.next = [swap(NOISE[k])]
        x, mean = theirs.step_pred(swap(toy(back(x), t)), x, t)
    want = back(mean)
    np.testing.assert_allclose(loop(s, plan, toy), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("n", quick(2, 4, 10, 25, 50))
@pytest.mark.parametrize(
    "config",
    [{}, {"s_churn": 0.0}, {"s_max": 200.0}, {"sigma_max": 20.0, "s_noise": 1.0}, {"s_min": 5.0}]
    + [{"sigma_min": 0.1, "s_churn": 4.0}, {"s_churn": 10.0, "s_noise": 1.1, "s_max": 10.0}],
    ids=str,
)
def test_karras_ve_as_diffusers(monkeypatch, config, n):
    from diffusers.schedulers.deprecated import KarrasVeScheduler

    # diffusers 0.42.1 takes squared sigmas for sigmas: its arithmetic is compared on the sigmas that were meant
    theirs, s = KarrasVeScheduler(**config), schedulers.KarrasVeScheduler(**config)
    theirs.set_timesteps(n)
    plan, sigmas = s.plan(n), [*np.sqrt(theirs.schedule.numpy()[::-1]).astype(float), 0.0]
    draws, k = Draws(monkeypatch, KarrasVeScheduler), 0
    x = x_hat = swap(LATENTS * plan.init_noise_sigma)  # with the first noise in it
    hat = float(plan.timesteps[0])
    for i, (sigma, to) in enumerate(zip(sigmas, sigmas[1:])):
        if i:
            draws.next = [swap(NOISE[k - 1])]
            x_hat, hat = theirs.add_noise_to_input(x, sigma)
        out = theirs.step(swap(toy(back(x_hat), hat)), hat, to, x_hat)
        x, k = out.prev_sample, k + 1
        if to:
            y = swap(toy(back(x), to))
            x, k = theirs.step_correct(y, hat, to, x_hat, x, out.derivative).prev_sample, k + 1
    want = back(x)
    np.testing.assert_allclose(loop(s, plan, toy), want, atol=2e-4 * np.abs(want).max() + 1e-4)


@pytest.mark.parametrize("n", quick(1, 2, 4, 10, 25, 50))
@pytest.mark.parametrize(
    "config",
    [{}, {"alpha_cum_end": 0.01, "gamma_cum_end": 0.9}, {"gamma_cum_end": 0.9}, {"num_train_timesteps": 50}]
    + [{"alpha_cum_start": 0.99}, {"gamma_cum_start": 0.001, "alpha_cum_start": 0.9}]
    + [{"num_train_timesteps": 200, "alpha_cum_end": 0.001, "gamma_cum_end": 0.95}],
    ids=str,
)
def test_vq_diffusion_as_diffusers(monkeypatch, config, n):
    K, rng = 7, np.random.default_rng(2)
    theirs = diffusers.VQDiffusionScheduler(num_vec_classes=K, **config)
    theirs.set_timesteps(n)
    s = schedulers.VQDiffusionScheduler(num_vec_classes=K, **config)
    plan, tokens = s.plan(n), np.full((2, 12), K - 1)
    state = s.init(plan, tokens, jax.random.key(0))
    table, x = rng.standard_normal((K, K - 1)), torch.from_numpy(tokens)
    for t in theirs.timesteps:
        log_p = np.asarray(jax.nn.log_softmax(2 * table[np.asarray(state.sample)].astype(np.float32)))
        uniform = rng.uniform(size=(2, 12, K)).astype(np.float32)
        there = torch.from_numpy(np.moveaxis(uniform, -1, 1))
        monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: there[:, : shape[1]])  # noqa: B023
        if t > 0:
            want = theirs.q_posterior(torch.from_numpy(np.moveaxis(log_p, -1, 1)), x, t)
            np.testing.assert_allclose(state.plan.posterior(state, log_p), np.moveaxis(want.numpy(), 1, -1), atol=2e-4)
        x = theirs.step(torch.from_numpy(np.moveaxis(log_p, -1, 1)), t, x).prev_sample
        state = s.step(state, log_p, -np.log(-np.log(uniform + 1e-30) + 1e-30))
        np.testing.assert_array_equal(state.sample, x)
    assert (np.asarray(state.sample) < K - 1).all()


@pytest.mark.parametrize("n", quick(1, 2, 4, 10, 25, 40))
@pytest.mark.parametrize(
    "config, setting",
    [({}, {}), ({"masking_schedule": "linear"}, {}), ({}, {"temperature": 3.0}), ({}, {"temperature": (4, 1)})]
    + [({"masking_schedule": "linear"}, {"temperature": t}) for t in (0.5, (1, 3), (0, 0))],
)
def test_amused_as_diffusers(monkeypatch, config, setting, n):
    # a prime count of tokens: where mask_ratio * count is whole, float32 decides on which side floor finds it
    K, N, rng = 11, 41, np.random.default_rng(3)
    theirs = diffusers.AmusedScheduler(mask_token_id=K, **config)
    theirs.set_timesteps(n, **setting)
    s = schedulers.AmusedScheduler(mask_token_id=K, **config)
    plan, tokens = s.plan(n, **setting), np.full((2, N), K)
    state, x = s.init(plan, tokens, jax.random.key(0)), torch.from_numpy(tokens)
    table = rng.standard_normal((N, K)).astype(np.float32)
    for t in theirs.timesteps:
        logits = np.broadcast_to(table + np.asarray(state.sample).sum() % 5, (2, N, K)).astype(np.float32) * 1.5
        g, gm = rng.gumbel(size=(2, N, K)).astype(np.float32), rng.gumbel(size=(2, N)).astype(np.float32)
        pick = lambda p, n, **kw: (torch.log(p) + torch.from_numpy(g.reshape(-1, K))).argmax(-1)[:, None]  # noqa: B023
        monkeypatch.setattr(torch, "multinomial", pick)
        module = sys.modules[diffusers.AmusedScheduler.__module__]
        monkeypatch.setattr(module, "gumbel_noise", lambda *a, **k: torch.from_numpy(gm))  # noqa: B023
        x = theirs.step(torch.from_numpy(logits), int(t), x).prev_sample
        state = s.step(state, logits, (g, gm))
        np.testing.assert_array_equal(state.sample, x)
    some, keys = s.plan(n, strength=(n + 1) // 2 / n), jax.random.split(jax.random.key(1), 2)
    masked = np.asarray(some.mask(np.zeros((2, N), np.int32), keys) == K)
    assert n == some.steps == 1 and masked.all() or abs(masked.mean() - plan.mask_ratio[n - some.steps - 1]) < 0.2


@pytest.mark.parametrize(
    "name, required",
    [("RePaint", {}), ("ScoreSdeVe", {}), ("VQDiffusion", {"num_vec_classes": 5}), ("Amused", {"mask_token_id": 5})]
    + [("KarrasVe", {}), ("ScoreSdeVp", {})],
)
def test_configs_of_those_without_a_table(name, required, tmp_path):
    name += "Scheduler"
    cls = getattr(diffusers.schedulers.deprecated if "Vp" in name or "Karras" in name else diffusers, name)
    want = {k: v for k, v in cls(**required).config.items() if not k.startswith("_")}
    s = getattr(schedulers, name)(**required)
    assert s.option_values() == want
    s.save_config(tmp_path)
    assert schedulers.from_config(schedulers.read_config(tmp_path)) == s and s.compatibles == (type(s),)
    assert {k: v for k, v in cls.from_pretrained(tmp_path).config.items() if not k.startswith("_")} == want


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 1000])
def test_one_step_and_a_thousand_without_a_table_are_finite(n):
    image = np.tanh(LATENTS)
    cases = {
        "RePaintScheduler": ({}, LATENTS, (image, image > 0), lambda x, t: 0.1 * x),
        "ScoreSdeVeScheduler": ({}, LATENTS, (), lambda x, t: -x / (1 + t**2)),
        "VQDiffusionScheduler": (
            {"num_vec_classes": 5, "num_train_timesteps": 1000},
            np.full((2, 12), 4),
            (),
            lambda x, t: jax.nn.log_softmax(jnp.ones((*x.shape, 4))),
        ),
        "AmusedScheduler": ({"mask_token_id": 5}, np.full((2, 12), 5), (), lambda x, t: jnp.ones((*x.shape, 5))),
    }
    for name, (config, start, given, network) in cases.items():
        s = getattr(schedulers, name)(**config)
        plan = s.plan(n, jump_n_sample=1) if name == "RePaintScheduler" else s.plan(n)
        start = start * plan.init_noise_sigma if hasattr(plan, "init_noise_sigma") else start
        state = s.init(plan, start, jax.random.key(0), *given)
        advance = lambda _, run, s=s, network=network: s.step(run, network(run.model_input, run.timestep))
        state = jax.jit(
            lambda state, advance=advance, steps=int(plan.steps): jax.lax.fori_loop(0, steps, advance, state)
        )(state)
        assert state.index == plan.steps >= n and np.isfinite(state.sample).all(), name


def test_every_documented_scheduler_is_here():
    theirs = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    # schedulers of single models, after the list that this package follows
    later = {name for name in theirs if name not in schedulers.SCHEDULERS}
    assert "UniPCMultistepScheduler" not in later and not later & set(CASES)
    assert {"LMSDiscreteScheduler", "VQDiffusionScheduler", "KarrasVeScheduler"} <= set(schedulers.SCHEDULERS)
    assert flaxdiff.SchedulerMixin is schedulers.Scheduler and len(flaxdiff.KarrasDiffusionSchedulers) == 15
