"""Schedulers against diffusers, elementwise, and the properties that make them tables.

One list of configurations drives everything: a new class is tested by adding its lines. The model is a nonlinear toy;
noise is injected, the same array on both sides.
"""

import copy
import functools
import importlib
import itertools
import math
import pickle
import sys
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch

from flaxdiff import schedulers
from flaxdiff.schedulers import tables

diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept:DeprecationWarning",  # diffusers gives torch tensors to numpy's functions
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",  # and makes arrays of them
    "ignore:`algorithm_types.* deprecated:FutureWarning",  # still there
    "ignore:The given NumPy array is not writable:UserWarning",  # torch only reads what jax lends it here
)

STEPS = (1, 2, 4, 7, 10, 25, 50)
BOUND = 100
SHAPE = (2, 4, 3, 3)  # ours, channels last
RNG = np.random.default_rng(0)
MIX = (RNG.standard_normal((3, 3)) / 4).astype(np.float32)
LATENTS = RNG.standard_normal(SHAPE).astype(np.float32)
NOISE = RNG.standard_normal((BOUND, *SHAPE)).astype(np.float32)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V0 = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "sample_max_value": 2.5, "dynamic_thresholding_ratio": 0.8}

FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


def tau_everywhere(t):
    return 0.6


TWO_STAGE = [
    {**SD, "use_karras_sigmas": True},
    {**SD, "use_exponential_sigmas": True, "prediction_type": "v_prediction"},
    {**SD, "use_beta_sigmas": True},
    {**SD, "timestep_spacing": "leading", "steps_offset": 1},
    {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"trained_betas": tuple(np.linspace(1e-3, 0.015, 1000)), "use_karras_sigmas": True},
]
COGVIDEO = [
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"snr_shift_scale": 1.0, "set_alpha_to_one": False, "steps_offset": 1},
    {"timestep_spacing": "linspace", "prediction_type": "sample"},
    {"beta_schedule": "linear", "prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    {"trained_betas": tuple(np.linspace(1e-4, 0.02, 1000)), "snr_shift_scale": 2.0},
]
DISTILLED = [
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "beta_schedule": "linear"},
    {"original_inference_steps": 100},
    {"clip_sample": True, "clip_sample_range": 2.0},
    {**THRESHOLD},
    {"beta_schedule": "squaredcos_cap_v2", "timestep_scaling": 0.01, "plan_original_inference_steps": 200},
]
FLOWS = [
    {"shift": 3.0},
    {"use_dynamic_shifting": True, "plan_mu": 0.7},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1, "plan_mu": 2.0},
    {"use_karras_sigmas": True, "shift": 2.0},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True, "num_train_timesteps": 500},
    {"invert_sigmas": True, "shift": 1.5},
]
EDMS = [
    {"prediction_type": "v_prediction"},
    {"sigma_schedule": "exponential", "sigma_max": 10.0},
    {"sigma_data": 1.0, "final_sigmas_type": "sigma_min"},
    {"rho": 3.0, "sigma_min": 0.01},
    {"sigma_data": 0.2, "sigma_schedule": "exponential", "prediction_type": "v_prediction"},
]

# class -> configurations; keys starting with "plan_" go to plan / step, not to the config
CASES = {
    "DDPMScheduler": [
        {},
        {**SD, "clip_sample": False},
        {"variance_type": "fixed_large", "clip_sample_range": 2.0},
        {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "prediction_type": "sample"},
        {"beta_schedule": "laplace", "timestep_spacing": "linspace", "variance_type": "fixed_large"},
        {**SD, **V0},
        {**SD, **THRESHOLD, "steps_offset": 1},
    ],
    "DDIMScheduler": [
        {},
        {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {**SD, **V0, "plan_eta": 0.7},
        {"timestep_spacing": "linspace", "prediction_type": "sample", "clip_sample_range": 0.5},
        {"beta_schedule": "squaredcos_cap_v2", "plan_eta": 1.0},
        {"plan_use_clipped_model_output": True, "trained_betas": tuple(np.linspace(1e-4, 0.03, 1000))},
        {**SD, **THRESHOLD, "plan_eta": 0.3},
    ],
    "PNDMScheduler": [
        {"skip_prk_steps": True},
        {**SD, "skip_prk_steps": True, "steps_offset": 1},
        {**SD, "skip_prk_steps": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"skip_prk_steps": True, "timestep_spacing": "linspace", "set_alpha_to_one": True},
        {},
        {**SD, "timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction", "set_alpha_to_one": True, "beta_schedule": "squaredcos_cap_v2"},
    ],
    "EulerDiscreteScheduler": [
        {},
        {**SD, "use_karras_sigmas": True, "prediction_type": "v_prediction"},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"},
        {**SD, "use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
        {**SD, "use_beta_sigmas": True, "prediction_type": "sample"},
        {**SD, "interpolation_type": "log_linear"},
        {**SD, **V0},
        {**SD, "prediction_type": "v_prediction", "timestep_type": "continuous", "sigma_min": 0.01},
        {**SD, "plan_s_churn": 5.0, "plan_s_tmin": 0.1, "plan_s_tmax": 5.0, "plan_s_noise": 1.01},
        {**SD, "plan_s_churn": 5.0, "prediction_type": "v_prediction"},
    ],
    "EulerAncestralDiscreteScheduler": [
        {},
        {**SD},
        {**SD, **V0},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "leading"},
        {"trained_betas": tuple(np.linspace(1e-4, 0.03, 1000))},
        {"timestep_spacing": "trailing"},
    ],
    "DPMSolverMultistepScheduler": [
        {},
        {**SD, "solver_order": 3, "use_karras_sigmas": True},
        {**SD, "solver_order": 1, "timestep_spacing": "leading", "steps_offset": 1},
        {**SD, "solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {**SD, "solver_type": "heun", "use_exponential_sigmas": True},
        {**SD, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "euler_at_final": True},
        {**SD, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun", **THRESHOLD},
        {**SD, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {**SD, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {**SD, "use_lu_lambdas": True, "prediction_type": "sample"},
        {**SD, "use_beta_sigmas": True, **THRESHOLD},
        {**SD, **V0},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "use_karras_sigmas": True},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
        {**FLOW},
    ],
    "DPMSolverSinglestepScheduler": [
        {},
        {**SD, "solver_order": 3, "use_karras_sigmas": True},
        {**SD, "solver_order": 3, "solver_type": "heun", "lower_order_final": True},
        {**SD, "solver_order": 1, "prediction_type": "sample"},
        {**SD, "solver_type": "heun", "use_exponential_sigmas": True, "prediction_type": "v_prediction"},
        {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {**SD, "algorithm_type": "sde-dpmsolver++", "use_beta_sigmas": True},
        {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, **THRESHOLD},
        {**FLOW},
    ],
    "DPMSolverMultistepInverseScheduler": [
        {},
        {**SD, "solver_order": 3, "timestep_spacing": "leading", "steps_offset": 1},
        {**SD, "solver_order": 1, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {**SD, "solver_type": "heun", "use_exponential_sigmas": True},
        {**SD, "algorithm_type": "dpmsolver", "euler_at_final": True},
        {**SD, "use_beta_sigmas": True, "prediction_type": "sample"},
        {**SD, "lambda_min_clipped": -2.0, **THRESHOLD},
    ],
    "DEISMultistepScheduler": [
        {},
        {**SD, "solver_order": 3, "use_karras_sigmas": True},
        {**SD, "solver_order": 3, "lower_order_final": False},
        {**SD, "solver_order": 1, "prediction_type": "sample"},
        {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1, "use_exponential_sigmas": True},
        {**SD, "use_beta_sigmas": True, **THRESHOLD},
        {**FLOW, "flow_shift": 0.5},
    ],
    "UniPCMultistepScheduler": [
        {},
        {**SD, "solver_order": 3, "use_karras_sigmas": True},
        {**SD, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {**SD, "solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
        {**SD, "solver_order": 1, "disable_corrector": (0, 2)},
        {**SD, "disable_corrector": (0,), "prediction_type": "v_prediction", "timestep_spacing": "leading"},
        {**SD, "predict_x0": False, "final_sigmas_type": "sigma_min"},
        {**SD, "predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3, "lower_order_final": False},
        {**SD, "use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0, "prediction_type": "sample"},
        {**SD, "use_beta_sigmas": True, **THRESHOLD},
        {**SD, **V0},
        {**FLOW},
        {**FLOW, "shift_terminal": 0.1, "final_sigmas_type": "sigma_min"},
        {**FLOW, "use_karras_sigmas": True},
    ],
    "SASolverScheduler": [
        {},
        {**SD, "predictor_order": 3, "corrector_order": 4, "use_karras_sigmas": True},
        {**SD, "predictor_order": 1, "corrector_order": 1, "prediction_type": "sample"},
        {**SD, "algorithm_type": "noise_prediction"},
        {**SD, "algorithm_type": "noise_prediction", "predictor_order": 3, "corrector_order": 3},
        {**SD, "tau_func": tau_everywhere, "prediction_type": "v_prediction", "lower_order_final": False},
        {**SD, "use_exponential_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
        {**SD, "use_beta_sigmas": True, **THRESHOLD},
        {**FLOW},
    ],
    "HeunDiscreteScheduler": [
        {},
        {**SD, "use_karras_sigmas": True, "prediction_type": "v_prediction"},
        {"beta_start": 0.005, "beta_end": 0.006, "use_exponential_sigmas": True, "prediction_type": "sample"},
        {**SD, "use_beta_sigmas": True},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": True},
        {"timestep_spacing": "trailing", "beta_schedule": "exp"},
        {"trained_betas": tuple(np.linspace(0.005, 0.012, 1000)), "clip_sample": True, "clip_sample_range": 2.0},
    ],
    "KDPM2DiscreteScheduler": [{}, *TWO_STAGE],
    "KDPM2AncestralDiscreteScheduler": [{}, *TWO_STAGE],
    "DPMSolverSDEScheduler": [{}, *TWO_STAGE, {**SD, "plan_s_noise": 0.7}],
    "LMSDiscreteScheduler": [
        {},
        {**SD, "use_karras_sigmas": True},
        {**SD, "use_exponential_sigmas": True, "prediction_type": "sample"},
        {**SD, "use_beta_sigmas": True, "prediction_type": "v_prediction"},
        {**SD, "timestep_spacing": "leading", "steps_offset": 1},
        {**SD, "timestep_spacing": "trailing", "plan_order": 2},
        {"trained_betas": tuple(np.linspace(1e-4, 0.03, 1000)), "plan_order": 3},
    ],
    "DDIMInverseScheduler": [
        {},
        {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {**SD, "timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "clip_sample_range": 0.5, "set_alpha_to_one": False},
        {"beta_schedule": "squaredcos_cap_v2"},
        {**SD, "prediction_type": "v_prediction", "clip_sample": False},
        {"trained_betas": tuple(np.linspace(1e-4, 0.03, 1000)), "timestep_spacing": "trailing"},
    ],
    "DDIMParallelScheduler": [
        {},
        {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {**SD, **V0, "plan_eta": 0.7},
        {"timestep_spacing": "linspace", "prediction_type": "sample", "clip_sample_range": 0.5},
        {"beta_schedule": "squaredcos_cap_v2", "plan_eta": 1.0},
        {"plan_use_clipped_model_output": True},
        {**SD, **THRESHOLD},
    ],
    "DDPMParallelScheduler": [
        {},
        {**SD, "clip_sample": False},
        {"variance_type": "fixed_large", "clip_sample_range": 2.0},
        {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "prediction_type": "sample"},
        {**SD, **V0},
        {**SD, **THRESHOLD, "steps_offset": 1},
    ],
    "UnCLIPScheduler": [
        {},
        {"prediction_type": "sample"},
        {"clip_sample": False},
        {"clip_sample_range": 5.0, "prediction_type": "sample"},
        {"num_train_timesteps": 500},
        {"num_train_timesteps": 250, "prediction_type": "sample", "clip_sample": False},
        {"clip_sample_range": 0.5},
    ],
    "CogVideoXDDIMScheduler": [{}, *COGVIDEO],
    "CogVideoXDPMScheduler": [{}, *COGVIDEO],
    "LCMScheduler": [{}, *DISTILLED],
    "TCDScheduler": [{}, *DISTILLED, {"plan_eta": 0.0}, {"plan_eta": 1.0}],
    "CMStochasticIterativeScheduler": [
        {},
        {"clip_denoised": False},
        {"s_noise": 0.5},
        {"sigma_min": 0.01, "sigma_max": 10.0},
        {"sigma_data": 1.0, "clip_denoised": False},
        {"rho": 3.0},
        {"num_train_timesteps": 100},
    ],
    "SCMScheduler": [{}, {"sigma_data": 1.0}, {"sigma_data": 0.2}, {"plan_max_timesteps": 1.4}]
    + [{"num_train_timesteps": 100}, {"sigma_data": 2.0, "plan_max_timesteps": 1.0}, {"sigma_data": 0.7}],
    "ConsistencyDecoderScheduler": [{}, {"sigma_data": 1.0}, {"sigma_data": 0.2}, {"num_train_timesteps": 1100}]
    + [{"sigma_data": 2.0}, {"num_train_timesteps": 2000}, {"num_train_timesteps": 1500, "sigma_data": 0.7}],
    "FlowMatchEulerDiscreteScheduler": [{}, *FLOWS, {"stochastic_sampling": True, "shift": 3.0}],
    "FlowMatchLCMScheduler": [{}, *FLOWS],
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}, {"num_train_timesteps": 500}, {"shift": 2.0}]
    + [{"plan_s_churn": 2.0}, {"shift": 2.0, "plan_s_churn": 3.0, "plan_s_tmin": 0.1, "plan_s_tmax": 0.8}]
    + [{"shift": 6.0, "plan_s_churn": 1.0, "plan_s_noise": 1.01}],
    "EDMEulerScheduler": [{}, *EDMS, {"plan_s_churn": 4.0, "plan_s_tmin": 0.1, "plan_s_noise": 1.01}],
    "EDMDPMSolverMultistepScheduler": [
        {},
        *EDMS,
        {"solver_order": 3},
        {"solver_order": 1, "euler_at_final": True},
        {"solver_type": "heun", "euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {**THRESHOLD, "prediction_type": "v_prediction"},
    ],
    "CosineDPMSolverMultistepScheduler": [{}, {"prediction_type": "epsilon"}, {"sigma_schedule": "karras"}]
    + [{"solver_order": 1}, {"solver_type": "heun", "sigma_data": 0.5}, {"euler_at_final": True, "sigma_max": 80.0}]
    + [{"rho": 3.0, "sigma_schedule": "karras", "lower_order_final": False}],
    "IPNDMScheduler": [{}, {"num_train_timesteps": 100}]
    + [{"trained_betas": tuple(np.linspace(1, 0, n + 1) ** power)} for n, power in ((4, 1), (10, 1), (10, 2), (25, 1))]
    + [{"trained_betas": tuple(np.cos(np.linspace(0, np.pi / 2, 51)))}],
    "DDPMWuerstchenScheduler": [{}, {"scaler": 2.0}, {"scaler": 0.5}, {"s": 0.02}, {"scaler": 3.0, "s": 0.001}]
    + [{"scaler": 0.2}, {"s": 0.1}],
}
ALL = [(name, config) for name, configs in CASES.items() for config in configs]


def quick(cases, n):
    """The first n configurations of each class for the quick run, the others marked slow."""
    slow = lambda name, config: config not in CASES[name][:n]
    return [pytest.param(case, marks=pytest.mark.slow if slow(*case) else ()) for case in cases]


def ids(case):
    name, config = case
    shown = [f"{k}={getattr(v, '__name__', v)}" for k, v in config.items() if k != "trained_betas"]
    return "-".join([name, *shown])


def split(config):
    plan = {k[5:]: v for k, v in config.items() if k.startswith("plan_")}
    return {k: v for k, v in config.items() if not k.startswith("plan_")}, plan


def ours(name, config):
    return getattr(schedulers, name)(**split(config)[0])


def theirs(name, config):
    config = {k: list(v) if k == "trained_betas" else v for k, v in split(config)[0].items()}
    return peer(name)(**config)


# --- the two loops ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="channels")
def generate(plan, latents, noise, key, channels=1):
    """The loop of a pipeline around a toy network, noise injected."""

    def body(state, z):
        def evaluate(state):
            y = jnp.tanh(state.model_input @ MIX + jnp.sin(state.timestep / 100))
            return tables.step(state, jnp.concatenate([y, *[0.5 * y] * (channels - 1)], -1), z)

        return jax.lax.cond(state.index < state.plan.steps, evaluate, lambda s: s, state), None

    return jax.lax.scan(body, tables.init(plan, latents, key), noise)[0].sample


def run(plan, channels=1):
    plan = plan.pad(BOUND)
    return np.asarray(generate(plan, LATENTS * plan.init_noise_sigma, NOISE, jax.random.key(0), channels))


class Increments:
    """Brownian increments in sigma made of the injected noise, in place of torchsde's."""

    def __init__(self, *args, **kwargs):
        self.path = {}  # sigma -> what the walk has come to

    def __call__(self, sigma, sigma_to):
        sigma, sigma_to = float(sigma), float(sigma_to)
        if sigma not in self.path:
            self.path = {sigma: 0.0}
        last = min(self.path)
        step = next(Increments.draws) * math.sqrt(last - sigma_to)
        self.path[sigma_to] = self.path[last] + step
        return (self.path[sigma_to] - self.path[sigma]) / math.sqrt(sigma - sigma_to)


def import_sde_modules():
    """diffusers' modules that import torchsde, which `Increments` replaces."""
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    for name in ("dpmsolver_sde", "cosine_dpmsolver_multistep"):
        importlib.import_module(f"diffusers.schedulers.scheduling_{name}").BrownianTreeNoiseSampler = Increments


import_sde_modules()
SDE = {
    "DPMSolverSDEScheduler": "dpmsolver_sde",
    "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep",
}


def peer(name):
    """diffusers' class of that name."""
    return getattr(
        sys.modules[f"diffusers.schedulers.scheduling_{SDE[name]}"] if name in SDE else diffusers.schedulers, name
    )


def swap(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def their_steps(scheduler, **options):
    """diffusers' step as (output, t, k, x) -> x, whatever its signature."""
    name, times = type(scheduler).__name__, scheduler.timesteps
    if name == "UnCLIPScheduler":  # as its pipelines do
        later = [*(int(t) for t in times[1:]), None]
        return lambda y, t, k, x: scheduler.step(y, t, x, prev_timestep=later[k]).prev_sample
    if name == "DDPMWuerstchenScheduler":
        return lambda y, t, k, x: scheduler.step(y, t.expand(len(x)), x).prev_sample
    if name == "CogVideoXDPMScheduler":
        old = [None]

        def step(y, t, k, x):
            x, old[0] = scheduler.step(y, old[0], t, times[k - 1] if k else None, x, return_dict=False)
            return x

        return step
    return lambda y, t, k, x: scheduler.step(y, t, x, **options).prev_sample


# Those that tell the network whole times on a ramp of sigmas.
ROUNDED = tuple(
    peer(name) for name in CASES if "DPMSolver" in name or "DEIS" in name or "UniPC" in name or "SA" in name
)


def reference(scheduler, plan, begin=0, channels=1, **options):
    """diffusers' loop over the rows of our plan, starting at its row `begin` as its img2img pipelines do.

    The network is told our times, once they are seen to be diffusers': in float32 it truncates 998.99997 to 998.
    """
    module = importlib.import_module(type(scheduler).__module__)
    times = scheduler.timesteps[begin : begin + int(plan.steps)]
    rounded = times.dtype == torch.int64 and isinstance(scheduler, ROUNDED)
    np.testing.assert_allclose(plan.timesteps, times.numpy(), rtol=2e-5, atol=1 if rounded else 5e-3)
    start = getattr(scheduler, "init_noise_sigma", 1.0)
    np.testing.assert_allclose(plan.init_noise_sigma, start, rtol=1e-4, atol=1e-5)
    x = swap(LATENTS) * start
    if isinstance(scheduler, diffusers.SASolverScheduler):  # its coefficients at order 4 lose float32's digits
        x, scheduler.sigmas = x.double(), scheduler.sigmas.double()
    if isinstance(scheduler, diffusers.UnCLIPScheduler):  # of 1 - alphas_cumprod[0] float32 leaves three digits
        x, scheduler.betas = x.double(), scheduler.betas.double()
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas, 0)
    if hasattr(scheduler, "set_begin_index"):  # without it, diffusers skips a row when the first time occurs twice
        scheduler.set_begin_index(begin)
    elif hasattr(scheduler, "_init_step_index"):  # the same
        scheduler._step_index = begin
    step, original = their_steps(scheduler, **options), getattr(module, "randn_tensor", None)
    module.randn_tensor = lambda *args, **kwargs: next(Increments.draws)
    try:
        for k, t in enumerate(times):
            Increments.draws = itertools.repeat(swap(NOISE[k]))
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            wave = math.sin(float(plan.timesteps[k]) / 100)
            y = torch.tanh(torch.einsum("bchw,cd->bdhw", seen.float(), torch.from_numpy(MIX)) + wave)
            y = torch.cat([y, *[0.5 * y] * (channels - 1)], 1)
            x = step(y, t, k, x)
    finally:
        module.randn_tensor = original
    return np.moveaxis(x.numpy(), 1, -1)


def agree(plan, want, channels=1, of=None):
    """Ours equals `want` to 1e-4 of its largest value.

    Where that is smaller, to what float32 leaves diffusers: its resolution of the sample that the run started from, and
    of 1 - alphas_cumprod where a run of one step starts at t = 0.
    """
    got = run(plan, channels)
    assert np.isfinite(want).all() and got.shape == want.shape
    error = np.abs(got - want).max()
    peers.differs(float(error / max(np.abs(want).max(), plan.init_noise_sigma)), of)
    floor = max(1e-5, 4 * np.finfo(np.float32).eps * float(plan.init_noise_sigma))
    assert error <= max(1e-4 * np.abs(want).max(), floor), f"{error:.1e} of {np.abs(want).max():.1e}"


# --- parity ----------------------------------------------------------------------------------------------------------


def allowed(name, config):
    """The step counts that a class takes."""
    if name == "ConsistencyDecoderScheduler":
        return (2,)
    if name == "IPNDMScheduler" and "trained_betas" in config:
        return (len(config["trained_betas"]) - 1,)
    if name == "CMStochasticIterativeScheduler":
        return tuple(n for n in STEPS if n <= config.get("num_train_timesteps", 40))
    if name == "PNDMScheduler" and not config.get("skip_prk_steps"):
        return STEPS[2:]
    # at one step diffusers divides by zero (UnCLIP) or starts from sigma_min (the EDM family's exponential sigmas)
    default = "exponential" if name.startswith("Cosine") else ""
    # where it stretches a lone sigma of 1, it divides by zero as well; EDM's lone step goes nowhere
    if config.get("shift_terminal") or (name == "EDMEulerScheduler" and "final_sigmas_type" in config):
        return STEPS[1:]
    # its last step goes nowhere, and from 15 steps on it is of order 2, where heun divides by the step: NaN
    if "Inverse" in name and config.get("solver_type") == "heun":
        return tuple(n for n in STEPS if n < 15)
    # the first step of two goes far down: float32 cancels sigma_to^2 - up^2 there, as its processor rounds
    if name == "KDPM2AncestralDiscreteScheduler":
        return tuple(n for n in STEPS if n != 2)
    if name == "UnCLIPScheduler" or config.get("sigma_schedule", default) == "exponential":
        return STEPS[1:]
    return STEPS


def schedule(name, config, n, scheduler=None):
    """diffusers' scheduler at n steps, and our plan."""
    scheduler, (_, options) = theirs(name, config) if scheduler is None else scheduler, split(config)
    setting = {key: options.pop(key) for key in ("mu", "original_inference_steps", "max_timesteps") if key in options}
    plan = ours(name, config).plan(n, **setting, **options)
    if name == "SCMScheduler" and n != 2:
        setting["intermediate_timesteps"] = None
    scheduler.set_timesteps(n, **setting)
    return scheduler, plan, options


@pytest.mark.parametrize("case", quick(ALL, 2), ids=ids)
def test_samples_as_diffusers(case):
    name, config = case
    scheduler = theirs(name, config)
    for n in allowed(name, config):
        if "Singlestep" in name:  # one step count changes its config for the next
            scheduler = theirs(name, config)
        scheduler, plan, options = schedule(name, config, n, scheduler)
        if "Inverse" in name and len(scheduler.timesteps) < n:
            continue  # it leaves out steps whose whole times coincide, and keeps their sigmas
        agree(plan, reference(scheduler, plan, **options), of=name)


PARTIAL = [
    ({"strength": 0.6}, 4),
    ({"strength": 1.0}, 0),
    ({"denoising_start": 0.8}, 8),
    ({"denoising_end": 0.8}, 0),
    ({"denoising_start": 0.4, "denoising_end": 0.75}, 4),
]


SIX = ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"]
MORE = ["HeunDiscrete", "KDPM2Discrete", "DPMSolverSDE", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"]


# where a step is two evaluations, SDXL's pipelines cut by half steps and ours by whole ones: only strength is compared
TWO = {"HeunDiscrete", "KDPM2Discrete", "DPMSolverSDE"}


@pytest.mark.parametrize(
    "name, window",
    [(name, w) for name in SIX + MORE for w in PARTIAL if "strength" in w[0] or name not in TWO],
    ids=str,
)
def test_partial_runs_as_diffusers(name, window):
    # not LMS: begun in the middle, diffusers takes an order for which it has no history yet
    name += "Scheduler"
    config = {**SD, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})}
    if name == "DPMSolverMultistepScheduler":
        config |= {"solver_order": 3, "use_karras_sigmas": True}
    window, begin = window
    scheduler = theirs(name, config)
    scheduler.set_timesteps(10)
    plan = ours(name, config).plan(10, **window)
    if "strength" not in window:  # the pipelines of SDXL cut by time
        cut = lambda share: round(1000 - share * 1000)
        start = cut(window["denoising_start"]) if "denoising_start" in window else 1000
        kept = [t for t in scheduler.timesteps if t < start]
        begin = len(scheduler.timesteps) - len(kept)
        assert int(plan.steps) == len([t for t in kept if t >= cut(window.get("denoising_end", 1.0))])
    agree(plan, reference(scheduler, plan, begin * ours(name, {}).order))


@pytest.mark.parametrize(
    "name, config, custom",
    [
        ("DDPMScheduler", SD, {"timesteps": [999, 700, 300, 20]}),
        ("EulerDiscreteScheduler", SD, {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}),
        ("EulerDiscreteScheduler", SD, {"sigmas": [14.6, 6.3, 3.8, 2.2, 1.3, 0.9, 0.5, 0.4, 0.2, 0.1, 0.0]}),
        ("DPMSolverMultistepScheduler", SD, {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}),
    ],
)
def test_custom_schedules_as_diffusers(name, config, custom):
    scheduler = theirs(name, config)
    scheduler.set_timesteps(**custom)
    plan = ours(name, config).plan(**custom)
    agree(plan, reference(scheduler, plan))


def test_dynamic_shift_as_diffusers():
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    scheduler = theirs("DPMSolverMultistepScheduler", {**config, "flow_shift": math.exp(0.7)})
    scheduler.set_timesteps(8)
    plan = ours("DPMSolverMultistepScheduler", config).plan(8, mu=0.7)
    agree(plan, reference(scheduler, plan))


@pytest.mark.parametrize(
    "name, config",
    [
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("DDPMScheduler", {**SD, "variance_type": "learned_range", "timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {**SD, "variance_type": "learned_range"}),
        ("DPMSolverMultistepScheduler", {**SD, "variance_type": "learned", "algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_learned_variance_as_diffusers(name, config):
    for n in STEPS:
        scheduler = theirs(name, config)
        scheduler.set_timesteps(n)
        plan = ours(name, config).plan(n)
        agree(plan, reference(scheduler, plan, channels=2), channels=2)


def test_learned_variance_is_the_network_s():
    # diffusers takes the square root of what the network says; ours of what of it is positive
    s = schedulers.DDPMScheduler(variance_type="learned", clip_sample=False)
    state = s.init(s.plan(4), LATENTS, jax.random.key(0))
    mean, variance = jnp.zeros(SHAPE), jnp.full(SHAPE, 0.25)
    with_noise = s.step(state, jnp.concatenate([mean, variance], -1), NOISE[0]).sample
    without = s.step(state, jnp.concatenate([mean, 0 * variance], -1), NOISE[0]).sample
    np.testing.assert_allclose(with_noise - without, 0.5 * NOISE[0], atol=1e-6)


@pytest.mark.parametrize("q", [0.0, 0.33, 0.995, 1.0])
def test_quantile_as_torch(q):
    """Found by counting; its gradient as well."""
    x = np.abs(np.random.default_rng(0).normal(size=(3, 8, 9, 4))).astype(np.float32)
    x[0, 0, 0], x[1] = 0, 7  # equal ones
    theirs = torch.from_numpy(x).flatten(1)
    np.testing.assert_allclose(
        tables.quantile(x, q, (1, 2, 3)).ravel(), torch.quantile(theirs, q, dim=1).numpy(), rtol=1e-6
    )
    last = theirs[2].requires_grad_()
    torch.quantile(last, q).backward()
    ours = jax.grad(lambda x: tables.quantile(x, q, (0, 1, 2)).sum())(x[2])
    np.testing.assert_allclose(ours.ravel(), last.grad.numpy(), atol=1e-4)


def test_ancestral_steps_from_great_sigma_are_finite():
    # from sigma = 20,291 float32 leaves diffusers a negative variance, and NaN at four steps
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    assert np.isfinite(run(schedulers.EulerAncestralDiscreteScheduler(**config).plan(4))).all()


def test_third_order_sde_is_consistent():
    # diffusers 0.42.1 has -1/2 for +1/2 in this solver's last coefficient, so that it leaves the trajectory even where
    # the prediction does not change; a constant x_0 must be crossed exactly, as by order 1
    config = {**SD, "algorithm_type": "sde-dpmsolver++", "prediction_type": "sample"}
    plans = [schedulers.DPMSolverMultistepScheduler(**config, solver_order=k).plan(20) for k in (1, 2, 3)]
    weights = [p.mix[5, 0, 1:6].sum() for p in plans]  # of this and the two earlier predictions together
    np.testing.assert_allclose(weights, weights[0], rtol=1e-5)


@pytest.mark.parametrize("name", SIX + ["HeunDiscrete", "LMSDiscrete", "DPMSolverSinglestep", "LCM", "TCD"])
def test_noise_and_velocity_as_diffusers(name):
    name += "Scheduler"
    config = {**SD, "prediction_type": "v_prediction"}
    ref, s = theirs(name, config), ours(name, config)
    t = [999, 500]
    times = torch.tensor(t, dtype=torch.float64 if "Discrete" in name else torch.int64)
    if name.startswith("DPM"):  # its levels run the wrong way until timesteps are set
        ref.set_timesteps(timesteps=t)
    want = ref.add_noise(swap(LATENTS), swap(NOISE[0]), times)
    got = jax.jit(s.add_noise)(LATENTS, NOISE[0], jnp.array(t))
    np.testing.assert_allclose(np.moveaxis(np.asarray(got), -1, 1), want, rtol=1e-4, atol=1e-4)
    assert s.add_noise(jnp.asarray(LATENTS, jnp.bfloat16), NOISE[0], 7).dtype == jnp.bfloat16
    ddpm = theirs("DDPMScheduler", SD)
    want = ddpm.get_velocity(swap(LATENTS), swap(NOISE[0]), torch.tensor(t))
    got = jax.jit(s.get_velocity)(LATENTS, NOISE[0], jnp.array(t))
    np.testing.assert_allclose(np.moveaxis(np.asarray(got), -1, 1), want, rtol=1e-4, atol=1e-5)


# --- tables ----------------------------------------------------------------------------------------------------------


def every(n, **config):
    count = lambda name: 2 if name == "ConsistencyDecoderScheduler" else n
    return [ours(name, {**config, **c}).plan(count(name), pad_to=BOUND) for name, (c, *_) in CASES.items()]


def test_one_program_serves_all():
    generate.clear_cache()
    for n in (1, 7, 30):
        for plan in every(n):
            run(plan)
    assert generate._cache_size() == 1


def test_vmap_over_plans():
    plans = every(5)
    stack = jax.tree.map(lambda *a: jnp.stack(a), *plans)
    start = jnp.stack([LATENTS * p.init_noise_sigma for p in plans])
    together = jax.vmap(generate, (0, 0, None, None))(stack, start, NOISE, jax.random.key(0))
    for got, plan in zip(together, plans):
        want = run(plan)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", CASES)
def test_padding_is_inert(name):
    plan = ours(name, CASES[name][0]).plan(2 if name == "ConsistencyDecoderScheduler" else 4)
    s, key = ours(name, {}), jax.random.key(3)
    rows, padded = int(plan.steps), plan.pad(BOUND)
    state, long = s.init(plan, LATENTS, key), s.init(padded, LATENTS, key)
    for _ in range(rows):
        state, long = s.step(state, 0.3 * state.model_input), s.step(long, 0.3 * long.model_input)
    for _ in range(3):
        long = s.step(long, long.model_input)
    np.testing.assert_array_equal(state.sample, long.sample)
    assert not padded.noisy[rows:].any() and long.index == rows + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_thousand_steps_and_one_are_finite(name):
    most = {
        "ConsistencyDecoderScheduler": 2,
        "CMStochasticIterativeScheduler": 40,
        "LCMScheduler": 50,
        "TCDScheduler": 50,
    }
    most = most.get(name, 1000)
    for n in (2 if most == 2 else 1, most):
        plan = ours(name, CASES[name][0]).plan(n)
        assert np.isfinite(plan.mix).all() and int(plan.steps) >= n


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_exact_denoiser_returns_the_image(name):
    s = ours(name, {**SD, "prediction_type": "sample", **({"clip_sample": False} if "DD" in name else {})})
    plan = s.plan(8, strength=0.5)
    image = jnp.asarray(LATENTS)
    state = s.init(plan, plan.alpha[0] * image + plan.sigma[0] * NOISE[0], jax.random.key(0))
    for _ in range(int(plan.steps)):
        state = tables.step(state, image)
    np.testing.assert_allclose(state.sample, image, atol=1e-5)


def test_noise_follows_each_image_s_key():
    s = schedulers.EulerAncestralDiscreteScheduler()
    plan = s.plan(3)

    def go(latents, key):
        state = s.init(plan, latents, key)
        for _ in range(3):
            state = tables.step(state, 0.1 * state.model_input)
        return state.sample

    both = go(LATENTS, jax.random.key(5))
    np.testing.assert_allclose(go(LATENTS[:1], jax.random.key(5)), both[:1], rtol=1e-6)  # whatever the batch
    keys = tables.image_keys(jax.random.key(5), 2)
    np.testing.assert_allclose(go(LATENTS[1:], keys[1:]), both[1:], rtol=1e-6)  # one picture again
    np.testing.assert_allclose(go(LATENTS, jax.random.PRNGKey(5)), both, rtol=1e-6)  # keys of the old kind
    assert np.abs(go(LATENTS, jax.random.key(6)) - both).max() > 0.1
    draw = jax.random.normal(jax.random.fold_in(keys[1], 0), SHAPE[1:])
    state = s.init(plan, LATENTS, keys)
    given = s.step(state, LATENTS, jnp.stack([draw, draw])).sample[1]
    np.testing.assert_allclose(s.step(state, LATENTS).sample[1], given, rtol=1e-6)


def test_gradient_through_a_run():
    plan = schedulers.DPMSolverMultistepScheduler(**SD).plan(4, pad_to=BOUND)
    total = lambda x: generate(plan, x, NOISE, jax.random.key(0)).sum()
    g, e = jax.grad(total)(jnp.asarray(LATENTS)), np.zeros(SHAPE, np.float32)
    e[0, 1, 2, 0] = 1e-2
    np.testing.assert_allclose((total(LATENTS + e) - total(LATENTS - e)) / 2e-2, g[0, 1, 2, 0], rtol=1e-2)


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_config_has_diffusers_keys_and_defaults(name):
    want = {k: v for k, v in peer(name)().config.items() if not k.startswith("_")}
    got = getattr(schedulers, name)().option_values()
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in got.items()} == want


@pytest.mark.parametrize("case", quick([case for case in ALL if case[1] in CASES[case[0]][:3]], 1), ids=ids)
def test_config_travels_by_folder(case, tmp_path):
    name, config = case
    s = ours(name, config)
    s.save_config(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    (tmp_path / "plain").touch()  # others may read the one as they may read the other
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "scheduler_config.json").stat().st_mode
    assert (
        getattr(schedulers, name).from_pretrained(tmp_path)
        == s
        == schedulers.from_config(schedulers.read_config(tmp_path))
    )
    assert hash(s) == hash(getattr(schedulers, name).from_pretrained(tmp_path))
    back = peer(name).from_pretrained(tmp_path).config
    assert all(back[k] == v for k, v in split(config)[0].items() if not isinstance(v, tuple))
    theirs(name, config).save_pretrained(tmp_path / "theirs" / "scheduler")
    assert getattr(schedulers, name).from_pretrained(tmp_path / "theirs", subfolder="scheduler") == s


def test_swap_keeps_what_was_chosen():
    for config in ({"skip_prk_steps": True, **SD}, {"timestep_spacing": "trailing", "steps_offset": 1}, {}):
        ref = diffusers.PNDMScheduler(**config)
        mine = schedulers.PNDMScheduler(**config)
        for name in [name for name in CASES if getattr(schedulers, name).swaps and name not in SDE]:
            want = getattr(diffusers, name).from_config(ref.config).config
            got = getattr(schedulers, name).from_config(mine).option_values()
            got = {k: list(v) if isinstance(v, tuple) else v for k, v in got.items()}
            assert all(want[k] == v for k, v in got.items()), name
            assert getattr(schedulers, name).from_config(mine.config) == getattr(schedulers, name).from_config(mine)


def test_survives_copies():
    s = schedulers.PNDMScheduler(**SD, trained_betas=[0.1] * 1000)
    for same in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert same == s and hash(same) == hash(s) and same.config == s.config


def test_compatibles():
    for name in CASES:
        # what diffusers does not export it does not list, not even for itself
        theirs = {c.__name__ for c in getattr(peer(name)(), "compatibles", ())} | {name}
        got = {c.__name__ for c in getattr(schedulers, name)().compatibles}
        assert got - {"DPMSolverSDEScheduler"} == theirs - {"DPMSolverSDEScheduler"}  # theirs only beside torchsde
    assert schedulers.DPMSolverSDEScheduler in schedulers.PNDMScheduler().compatibles
    names = [c.name for c in diffusers.schedulers.KarrasDiffusionSchedulers]
    assert [c.name for c in schedulers.KarrasDiffusionSchedulers] == names


FLOW_EULER, UNIPC = schedulers.FlowMatchEulerDiscreteScheduler, schedulers.UniPCMultistepScheduler
DPM, DDIM, EULER = schedulers.DPMSolverMultistepScheduler, schedulers.DDIMScheduler, schedulers.EulerDiscreteScheduler


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DDIM().plan(0), "num_inference_steps=0 must be a positive"),
        (lambda: DDIM().plan(-3), "must be a positive"),
        (lambda: DDIM().plan(1001), "exceeds num_train_timesteps=1000"),
        (lambda: DPM().plan(1001), "exceeds"),
        (lambda: schedulers.PNDMScheduler().plan(3), "skip_prk_steps=True"),
        (lambda: DDIM().plan(), "no schedule"),
        (lambda: DDIM().plan(4, timesteps=[1]), "timesteps and num_inference_steps"),
        (lambda: EULER().plan(timesteps=[9, 3], sigmas=[3.0, 0.0]), "timesteps and sigmas"),
        (lambda: EULER().plan(timesteps=[3, 9]), "descending list"),
        (lambda: EULER().plan(timesteps=[9, 9, 3]), "without duplicates"),
        (lambda: EULER().plan(timesteps=[1000, 3]), r"must lie in \[0, 1000\)"),
        (lambda: EULER(use_karras_sigmas=True).plan(timesteps=[9, 3]), "excludes use_karras_sigmas"),
        (lambda: DDIM().plan(sigmas=[3.0, 0.0]), "does not take sigmas="),
        (lambda: DDIM().plan(4, mu=1.0), "does not take mu="),
        (lambda: DPM().plan(4, mu=1.0), "use_dynamic_shifting=True"),
        (lambda: DDIM().plan(4, etta=1.0), "no option of plan 'etta': did you mean 'eta'"),
        (lambda: DDIM().plan(4, strength=1.5), "strength=1.5 must lie"),
        (lambda: DDIM().plan(4, strength=0.1), "leaves none of 4 steps"),
        (lambda: DDIM().plan(4, denoising_end=1.5), "denoising_end=1.5 must lie"),
        (lambda: DDIM().plan(4, denoising_start=0.7, denoising_end=0.3), "must be smaller"),
        (lambda: DDIM().plan(4, pad_to=3), "does not fit a bound of 3"),
        (lambda: EULER(use_karras_sigmas=True, use_beta_sigmas=True), "exclude each other"),
        (lambda: EULER(prediction_type="eps"), "prediction_type='eps' must be one of 'epsilon'"),
        (lambda: DDIM(beta_schedule="cosine"), "beta_schedule='cosine' must be one of"),
        (lambda: DPM(solver_order=4), "solver_order=4 must be one of 1, 2, 3"),
        (lambda: DPM(algorithm_type="dpmsolver"), "final_sigmas_type='sigma_min'"),
        (lambda: DPM(prediction_type="flow_prediction"), "use_flow_sigmas"),
        (lambda: schedulers.DEISMultistepScheduler(final_sigmas_type="zero"), "no option 'final_sigmas_type'"),
        (lambda: schedulers.LCMScheduler().plan(51), "exceeds the 50 times"),
        (lambda: schedulers.TCDScheduler().plan(4, eta=1.5), r"eta=1.5 must lie in \[0, 1\]"),
        (lambda: schedulers.CMStochasticIterativeScheduler().plan(41), "exceeds num_train_timesteps=40"),
        (lambda: schedulers.ConsistencyDecoderScheduler().plan(3), "exactly 2"),
        (lambda: schedulers.SCMScheduler().plan(1001), "exceeds 1000"),
        (lambda: FLOW_EULER().plan(4, mu=1.0), "go together"),
        (lambda: FLOW_EULER(use_dynamic_shifting=True).plan(4), "go together"),
        (lambda: FLOW_EULER().plan(timesteps=[1001, 3]), r"must lie in \[0, 1000\)"),
        (lambda: UNIPC(use_dynamic_shifting=True, use_flow_sigmas=True).plan(4), "needs plan"),
        (lambda: UNIPC(shift_terminal=0.1), "set use_flow_sigmas"),
        (lambda: UNIPC().plan(sigmas=[1.0, 0.5]), "needs use_flow_sigmas=True"),
        (lambda: UNIPC(disable_corrector=[0], solver_p=EULER()), "solver_p="),
        (lambda: schedulers.DPMSolverMultistepInverseScheduler(algorithm_type="sde-dpmsolver++"), "must be one of"),
        (lambda: schedulers.IPNDMScheduler(trained_betas=[1.0, 0.0]).plan(4), "4 steps need 5"),
        (lambda: schedulers.LMSDiscreteScheduler().plan(4, order=5), "order=5 must be"),
        (lambda: schedulers.RePaintScheduler().plan(4, jump_length=0), "must be positive"),
        (lambda: schedulers.VQDiffusionScheduler(num_vec_classes=5).plan(101), "exceeds num_train_timesteps=100"),
        (
            lambda: schedulers.VQDiffusionScheduler(num_vec_classes=5, alpha_cum_end=0.01).plan(4),
            "negative probability",
        ),
        (lambda: schedulers.AmusedScheduler(mask_token_id=3).plan(0), "must be a positive"),
        (lambda: schedulers.scheduler("DPM adaptive").plan(4), "call solve"),
        (lambda: schedulers.scheduler("DPM++ 4M"), "no sampler 'DPM\\+\\+ 4M': did you mean"),
        (lambda: schedulers.scheduler("DDIM Karras"), "DDIMScheduler has no option 'use_karras_sigmas'"),
        (lambda: DDIM(trained_betas=[0.1, 0.2]).plan(4), "trained_betas holds 2 values"),
        (lambda: DDIM(rescale_betas_zero_snr=True, timestep_spacing="trailing").plan(4), "use 'v_prediction'"),
        (
            lambda: DDIM.from_config({"beta_strat": 0.1}),
            "DDIMScheduler has no option 'beta_strat': did you mean 'beta_start'",
        ),
        (lambda: DDIM.from_config({}, use_karras_sigmas=True), "DDIMScheduler has no option 'use_karras_sigmas'"),
        (
            lambda: schedulers.from_config({"_class_name": "EulerScheduler"}),
            "no scheduler class 'EulerScheduler': did you",
        ),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_at_the_step():
    s = DDIM()
    state = s.init(s.plan(4), LATENTS, jax.random.key(0))
    with pytest.raises(ValueError, match=r"output has shape \(2, 4, 3, 4\) and the sample \(2, 4, 3, 3\)"):
        s.step(state, jnp.zeros((2, 4, 3, 4)))
    with pytest.raises(ValueError, match="keys of shape .3,. for 2 images"):
        s.init(s.plan(4), LATENTS, jax.random.split(jax.random.key(0), 3))


def test_errors_at_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        DDIM.from_pretrained(tmp_path, subfolder="scheduler")
    for text, message in (("{", "not JSON"), ("[1]", "holds a list")):
        (tmp_path / "scheduler_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            DDIM.from_pretrained(tmp_path)
