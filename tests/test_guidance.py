"""Guidance: every rule against diffusers' own formula, per image, and in chains; then inside whole pipelines."""

import dataclasses
import functools
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from diffusers import guiders
from diffusers.guiders import adaptive_projected_guidance
from diffusers.hooks import smoothed_energy_guidance_utils as smoothed
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

import flaxdiff
from flaxdiff import guidance
from flaxdiff.guidance import Guidance, autoguidance, cfg, chain, interval, rescale, standard
from flaxdiff.guidance.rules import At, chosen, strengths
from flaxdiff.nn import perturb
from flaxdiff.schedulers import tables

rng = np.random.default_rng(0)
POSITIVE, NEGATIVE = (rng.standard_normal((2, 4, 6, 3)).astype(np.float32) for _ in range(2))
BOTH = {"positive": jnp.asarray(POSITIVE), "negative": jnp.asarray(NEGATIVE)}
THERE = [torch.tensor(a).permute(0, 3, 1, 2) for a in (POSITIVE, NEGATIVE)]
KEY = jax.random.key(0)
TEXT = dict(prompt=["a cat", "red"], negative_prompt="b")


def at(i: int, n: int = 10) -> At:
    """Evaluation i of n."""
    state = tables.init(flaxdiff.DDIMScheduler().plan(n), BOTH["positive"], KEY)
    return At(state._replace(index=jnp.int32(i)), {}, None, None)


def guess(rule: Guidance, steps=1, n: int = 10):
    """What a rule makes of the same predictions after some steps."""
    state = rule.init(BOTH["positive"])
    for i in range(steps):
        out, state = rule.combine(state, BOTH["positive"], BOTH, at(i, n))
    return out


# --- formulas --------------------------------------------------------------------------------------------------------


def projected(threshold, eta, momentum=None):
    guider = guiders.AdaptiveProjectedGuidance(5.0, momentum, threshold, eta=eta)
    guider.momentum_buffer = momentum and adaptive_projected_guidance.MomentumBuffer(momentum)
    return guider


# ours, diffusers', and how many times the same predictions come
FORMULAS = {
    "cfg": (cfg(5.0), guiders.ClassifierFreeGuidance(5.0), 1),
    "rescaled": (chain(cfg(5.0), rescale(0.7)), guiders.ClassifierFreeGuidance(5.0, 0.7), 1),
    "apg": (guidance.apg(5.0, 0.3, 2.5), projected(2.5, 0.3), 1),
    "apg, momentum": (guidance.apg(5.0, 0.0, 2.5, -0.5), projected(2.5, 0.0, -0.5), 3),
    "apg, unbound": (guidance.apg(5.0, 0.5, 0.0), projected(0.0, 0.5), 1),
    "zero star": (guidance.zero_star(4.0), guiders.ClassifierFreeZeroStarGuidance(4.0), 2),
    "zero star, at first": (guidance.zero_star(4.0, 2), guiders.ClassifierFreeZeroStarGuidance(4.0, 2), 2),
    "tangential": (guidance.tangential(6.0), guiders.TangentialClassifierFreeGuidance(6.0), 1),
    "interval": (interval(0.25, 0.6, cfg(5.0)), guiders.ClassifierFreeGuidance(5.0, start=0.25, stop=0.6), 2),
    "interval, within": (interval(0.25, 0.6, cfg(5.0)), guiders.ClassifierFreeGuidance(5.0, start=0.25, stop=0.6), 3),
    "interval, over": (interval(0.25, 0.6, cfg(5.0)), guiders.ClassifierFreeGuidance(5.0, start=0.25, stop=0.6), 7),
    "frequency": (
        guidance.frequency_decoupled(2.0, 6.0),
        lambda: guiders.FrequencyDecoupledGuidance(guidance_scales=[6.0, 2.0]),
        1,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    rule, guider, steps = FORMULAS[name]
    if callable(guider) and not isinstance(guider, guiders.BaseGuidance):
        pytest.importorskip("kornia")
        guider = guider()
    for i in range(steps):
        guider.set_state(step=i, num_inference_steps=10, timestep=torch.tensor(0))
        theirs = guider.forward(*THERE).pred
    np.testing.assert_allclose(guess(rule, steps), peers.nhwc(theirs), atol=2e-5)


def test_standard():
    guided = NEGATIVE + 5 * (POSITIVE - NEGATIVE)
    theirs = rescale_noise_cfg(torch.tensor(guided), torch.tensor(POSITIVE), 0.7)
    assert peers.relative(guess(standard(5.0, 0.7)), theirs) < 1e-6


def test_an_interval_holds_back_what_moves_the_sample():
    rule = interval(0.2, 0.5, Guidance(lambda state, guess, *_: (guess, state), adjust=lambda x, at: x + 1))
    moved = [float((rule.adjust(BOTH["positive"], at(i)) - POSITIVE).mean()) for i in (0, 2, 4, 5)]
    np.testing.assert_allclose(moved, [0, 1, 1, 0], atol=1e-6)


def test_strengths_may_differ_by_image():
    both = guess(chain(cfg(jnp.array([1.0, 4.0])), rescale(jnp.array([0.0, 0.5]))))
    assert peers.relative(both[0], POSITIVE[0]) < 1e-6
    assert peers.relative(both[1], guess(chain(cfg(4.0), rescale(0.5)))[1]) < 1e-6


def test_widths_of_blurs_may_differ_by_image():
    rule = guidance.seg(1.0, (jnp.array([1.0, 0.0]),), jnp.array([2.0, 3.0, 4.0]))
    told = rule.branches({"positive": {"text": jnp.zeros((3, 1))}})["seg"]["perturb"]["blur"]
    np.testing.assert_array_equal(told[0], [[2, 0], [3, 0], [4, 0]])


def test_a_sweep_of_scales():
    """Strengths are values: `vmap` goes over them in one program, which is that of any of them."""
    pipe, params = load(peers.stable_diffusion_1, "StableDiffusionPipeline")
    inputs = pipe.prepare_inputs(prompt="a cat", num_inference_steps=2, height=16, width=16, guidance_scale=2.0)
    scaled = lambda scale: {**inputs, "guidance": {**inputs["guidance"], "guidance_scale": scale}}
    scales = jnp.float32([1.5, 3.0, 7.5])
    sweep = jax.jit(jax.vmap(lambda scale: pipe.generate(params, KEY, scaled(scale))))(scales)
    one = jax.jit(lambda scale: pipe.generate(params, KEY, scaled(scale)))
    for image, scale in zip(sweep, scales):
        np.testing.assert_allclose(image, one(scale), atol=5e-6)
    assert one._cache_size() == 1 and np.abs(sweep[0] - sweep[2]).max() > 1e-3


def test_a_rule_may_remember():
    """The state goes from step to step through a chain."""
    count = Guidance(lambda n, g, p, at: (g + n.astype(g.dtype), n + 1), lambda x: jnp.int32(0))
    rule = chain(cfg(2.0), count)
    state = rule.init(BOTH["positive"])
    first, state = rule.combine(state, BOTH["positive"], BOTH, None)
    second, state = rule.combine(state, BOTH["positive"], BOTH, None)
    np.testing.assert_allclose(second - first, 1, atol=1e-6)
    assert state == ((), 2)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_blur_is_that_of_the_paper(sigma):
    """diffusers blurs where the deviation is above its threshold, and takes the mean below: the threshold is 0 here."""
    q = rng.standard_normal((2, 64, 5)).astype(np.float32)
    size = int(np.ceil(6 * sigma)) + 1 - int(np.ceil(6 * sigma)) % 2
    theirs = smoothed._gaussian_blur_2d(torch.tensor(q), size, sigma, 0.0)
    ours = perturb.blurred(jnp.asarray(q), jnp.array([sigma, 0.0]), (8, 8))
    assert peers.relative(ours[0], theirs[0]) < 1e-5
    np.testing.assert_array_equal(ours[1], q[1])
    mean = perturb.blurred(jnp.asarray(q), jnp.array([jnp.inf, jnp.inf]), (4, 16))
    np.testing.assert_allclose(mean[:, 3], q.mean(1), atol=1e-6)


# --- what is asked for -----------------------------------------------------------------------------------------------


@functools.cache
def load(build, cls: str):
    """A class of ours with a tiny saved pipeline's parts."""
    return getattr(flaxdiff, cls).from_pretrained(peers.saved(build))


def test_layers_are_found_by_parts_of_their_names():
    pipe, _ = load(peers.stable_diffusion_xl, "StableDiffusionXLPipeline")
    count = lambda *layers: int(sum(flags.sum() for flags in chosen(pipe.unet, layers)))
    assert count("down_blocks") + count("mid") + count("up_blocks") == count("attn1") > 3
    assert count("mid", r"transformer_blocks\.[01]") > count("mid")
    with pytest.raises(ValueError, match=r"No layer of UNet2D.*'nowhere'.*mid_block.attentions.0.transformer_blocks.0"):
        count("mid", "nowhere")
    with pytest.raises(ValueError, match="no regular expression"):
        count("mid(")


def test_strengths_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"guidance_rescale has shape \[3\] for 2 images"):
        strengths(standard, None, {"guidance_scale": 7.5, "guidance_rescale": [0.1, 0.2, 0.3]}, 2)
    pipe, _ = load(peers.stable_diffusion_1, "StableDiffusionPAGPipeline")
    with pytest.raises(ValueError, match=r"pag_scale has shape \[3\] for 2 images"):
        pipe.prepare_inputs(**TEXT, pag_scale=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="pag_weight"):
        pipe.prepare_inputs(**TEXT, pag_weight=1.0)
    with pytest.raises(ValueError, match="see a picture beside"):
        pipe = pipe.replace(guidance=standard)
        params = {name: flaxdiff.abstract(spec) for name, spec in pipe.specs}
        jax.eval_shape(pipe.generate, params, KEY, pipe.prepare_inputs(**TEXT, image_guidance_scale=1.5))


# --- what hinders blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "blur", "skip", "reference"])
@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_xl])
def test_hindered_blocks(build, kind):
    """One picture of two, in some blocks; PyTorch's by hooks."""
    pipe, params = load(build, "DiffusionPipeline")
    unet, spec = build().unet, pipe.unet
    x, t, text = (rng.standard_normal(shape).astype(np.float32) for shape in [(2, 8, 8, 4), (2,), (2, 5, 1)])
    text = np.tile(text, spec.config.cross_attention_dim // 2 * 2)[..., : spec.config.cross_attention_dim]
    added = {"text_embeds": np.ones((2, 24), np.float32), "time_ids": np.ones((2, 6), np.float32)}
    added = added if spec.config.addition_embed_type else None
    flags = [np.stack([0 * f, f * 0.8], 0) for f in chosen(spec, ["mid", r"up_blocks.*\.0$|transformer_blocks.0"])]
    run = jax.jit(lambda perturb: flaxdiff.apply(spec, params["unet"], x, t, text, added, perturb=perturb))
    told = [f + perturb.FIRST * f[::-1] / 0.8 for f in flags] if kind == "reference" else flags
    ours = run({kind: tuple(told)})

    def referring(module):
        """The second picture's queries meet the first's keys as well, which count 0.8 times."""
        q, k, v = (to(normed[module]) for to in (module.attn1.to_q, module.attn1.to_k, module.attn1.to_v))
        k, v = (torch.cat([a, a[:1].expand_as(a)], 1) for a in (k, v))
        q, k, v = (a.unflatten(-1, (module.attn1.heads, -1)).transpose(1, 2) for a in (q, k, v))
        weight = torch.cat([torch.ones(k.shape[2] // 2), torch.full((k.shape[2] // 2,), 0.8)]).log()
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=weight.expand(q.shape[2], -1))
        return module.attn1.to_out[0](h.transpose(1, 2).flatten(2))

    def hook(module, args, kwargs, output):
        second = {
            "reference": lambda: referring(module),
            "identity": lambda: module.attn1.to_out[0](module.attn1.to_v(normed[module])),
            "blur": lambda: smoothed._gaussian_blur_2d(output.clone(), 5, 0.8, 0.0),
            "skip": lambda: args[0],
        }[kind]()
        return torch.stack([output[0], second[1]])

    normed = {}
    for (_, block), flag in zip(transformer_blocks(unet), np.concatenate([f[1] for f in flags])):
        if not flag:
            continue
        if kind in ("identity", "reference"):
            block.norm1.register_forward_hook(lambda m, a, out, block=block: normed.__setitem__(block, out))
            block.attn1.register_forward_hook(lambda m, a, k, out, b=block: hook(b, a, k, out), with_kwargs=True)
        else:
            where = block if kind == "skip" else block.attn1.to_q
            where.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        there = added and {k: torch.tensor(v) for k, v in added.items()}
        theirs = unet(peers.nchw(x), torch.tensor(t), torch.tensor(text), added_cond_kwargs=there).sample
    assert peers.relative(ours, peers.nhwc(theirs)) < 1e-4
    plain = run(jax.tree.map(np.zeros_like, {kind: tuple(flags)}))
    np.testing.assert_allclose(plain[0], ours[0], atol=1e-6)
    assert peers.relative(plain[1], ours[1]) > 1e-4


def transformer_blocks(unet):
    """PyTorch's by name, in the order of their use."""
    found = [(n, m) for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    return sorted(found, key=lambda pair: ("d", "m", "u").index(pair[0][0]))


def test_names_of_blocks():
    unet = peers.stable_diffusion_xl().unet
    pipe, _ = load(peers.stable_diffusion_xl, "DiffusionPipeline")
    ours = [name for stack in guidance.rules.blocks(pipe.unet) for name in stack]
    assert ours == [name for name, _ in transformer_blocks(unet)]


# --- perturbed attention, with PyTorch's pipelines --------------------------------------------------------------------

PAG = [
    ("StableDiffusionPAGPipeline", peers.stable_diffusion_1, dict(pag_scale=2.0)),
    ("StableDiffusionPAGPipeline", peers.stable_diffusion_1, dict(pag_scale=2.0, guidance_scale=1.0)),
    ("StableDiffusionPAGPipeline", peers.stable_diffusion_2, dict(pag_scale=2.0, pag_adaptive_scale=0.003)),
    ("StableDiffusionPAGImg2ImgPipeline", peers.stable_diffusion_1, dict(pag_scale=2.0)),
    ("StableDiffusionPAGInpaintPipeline", peers.stable_diffusion_1, dict(pag_scale=2.0)),
    ("StableDiffusionControlNetPAGPipeline", peers.stable_diffusion_1, dict(pag_scale=2.0)),
    ("StableDiffusionControlNetPAGInpaintPipeline", peers.stable_diffusion_1, dict(pag_scale=2.0)),
    ("StableDiffusionXLPAGPipeline", peers.stable_diffusion_xl, dict(pag_scale=2.0, guidance_rescale=0.3)),
    ("StableDiffusionXLPAGImg2ImgPipeline", peers.stable_diffusion_xl, dict(pag_scale=2.0)),
    ("StableDiffusionXLPAGInpaintPipeline", peers.stable_diffusion_xl, dict(pag_scale=2.0)),
    ("StableDiffusionXLControlNetPAGPipeline", peers.stable_diffusion_xl, dict(pag_scale=2.0)),
    ("StableDiffusionXLControlNetPAGImg2ImgPipeline", peers.stable_diffusion_xl, dict(pag_scale=2.0)),
]
LAYERS = ["mid", "up_blocks.[01].attentions.0", "down"]
PICTURE, LED = (rng.random((2, 16, 16, 3), np.float32) for _ in range(2))
MASK = np.zeros((2, 16, 16, 1), np.float32)
MASK[:, 4:11, 3:14] = 1


@pytest.mark.parametrize(
    ("name", "build", "options"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (i in (3, 6, 8))) for i, case in enumerate(PAG)],
)
def test_pag_pipelines(name, build, options, tmp_path, monkeypatch):
    """Every class of it, with several layers, with and without a negative branch, and with a falling scale."""
    parts, net = build().components, {}
    if "ControlNet" in name:
        parts["controlnet"] = peers.controlnet(parts["unet"])
        parts["controlnet"].save_pretrained(tmp_path)
        net["controlnet"] = flaxdiff.ControlNetModel.from_pretrained(tmp_path)
    cls = getattr(diffusers, name)
    settings = {"add_watermarker": False} if "XL" in name else {"requires_safety_checker": False}
    accepted = {k: v for k, v in parts.items() if k in cls.__init__.__code__.co_varnames}
    there = cls(**accepted, pag_applied_layers=LAYERS, **settings)
    there.scheduler = diffusers.DDIMScheduler.from_config(there.scheduler.config)
    peers.sure(there.vae)
    there.set_progress_bar_config(disable=True)
    pipe, params = getattr(flaxdiff, name).from_pretrained(peers.saved(build), pag_applied_layers=LAYERS, **net)
    pipe = pipe.replace(scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler), progress=False)
    params["vae"]["quant_conv.bias"] = params["vae"]["quant_conv.bias"].at[4:].add(-60)

    noise, starts = rng.standard_normal((2, 8, 8, 4)).astype(np.float32), {}
    if "Img2Img" in name or "Inpaint" in name:
        starts = {"image": PICTURE, "strength": 0.7}
    if "Inpaint" in name:
        starts |= {"mask_image": MASK, "height": 16, "width": 16}
    if net:
        starts["control_image" if starts else "image"] = LED
    module = __import__(type(there).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(noise))
    options = TEXT | {"negative_prompt": ["b", "b"], "num_inference_steps": 4, "output_type": "np"} | options
    tensors = {k: peers.nchw(v) if isinstance(v, np.ndarray) else v for k, v in starts.items()}
    with torch.no_grad():
        theirs = there(**options, **tensors).images
    ours = pipe(params, KEY, **options, **starts, latents=noise).images
    assert peers.relative(ours, theirs, of=name) < 1e-3
    plain = pipe(params, KEY, **options | {"pag_scale": 0.0}, **starts, latents=noise).images
    assert peers.relative(ours, plain) > 1e-2


def test_auto_pipelines_with_pag():
    build = peers.stable_diffusion_1
    pipe, _ = flaxdiff.AutoPipelineForText2Image.from_pretrained(
        peers.saved(build), enable_pag=True, pag_applied_layers=["up"]
    )
    assert type(pipe) is flaxdiff.StableDiffusionPAGPipeline
    assert pipe.prepare_inputs(**TEXT)["guidance"]["pag_applied_layers"][0].sum() == 0
    assert type(flaxdiff.AutoPipelineForInpainting.from_pipe(pipe)) is flaxdiff.StableDiffusionPAGInpaintPipeline
    plain = flaxdiff.AutoPipelineForImage2Image.from_pipe(pipe, enable_pag=False)
    assert type(plain) is flaxdiff.StableDiffusionImg2ImgPipeline


# --- another network --------------------------------------------------------------------------------------------------


def auto(guidance_scale, autoguidance_scale=1.0):
    return chain(cfg(guidance_scale), autoguidance(autoguidance_scale))


@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_xl])
def test_autoguidance(build):
    """A smaller network, with keys, values and times of its own."""
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(build))
    small = dataclasses.replace(pipe.unet.config, block_out_channels=(8, 16))
    spec = pipe.unet._replace(config=small)
    params = params | {"unet_weaker": flaxdiff.init(spec, jax.random.key(1))}
    guided = type(pipe).from_pipe(pipe, unet_weaker=spec).replace(guidance=auto, progress=False)
    ask = lambda pipe, params, **options: guess_of(pipe, params, pipe.prepare_inputs(**TEXT, **options))
    plain = ask(pipe, params, guidance_scale=3.0)
    np.testing.assert_allclose(ask(guided, params, guidance_scale=3.0), plain, atol=1e-5)
    strong = ask(guided, params, guidance_scale=3.0, autoguidance_scale=2.5)
    positive = ask(pipe, params, guidance_scale=1.0)
    weaker = ask(pipe.replace(unet=spec), params | {"unet": params["unet_weaker"]}, guidance_scale=1.0)
    assert np.abs(positive - weaker).max() > 0.1
    np.testing.assert_allclose(strong, plain + 1.5 * (positive - weaker), atol=1e-4)
    with pytest.raises(ValueError, match="autoguidance needs a weaker network"):
        ask(pipe.replace(guidance=auto), params, guidance_scale=3.0)


def guess_of(pipe, params, inputs):
    program = pipe.program
    return np.asarray(jax.jit(lambda params: program.guess(params, *program.begin(params, KEY, inputs))[0])(params))


# --- what is attended to, further prompts -----------------------------------------------------------------------------


def both(name, build, monkeypatch, options, theirs=None, ours=None, shape=(2, 8, 8, 4)):
    """The pictures of ours and of PyTorch's class from the same noise."""
    parts = {**build().components, "feature_extractor": None, "safety_checker": None}
    cls = getattr(diffusers, name)
    accepted = {k: v for k, v in parts.items() if k in cls.__init__.__code__.co_varnames}
    there = cls(**accepted, requires_safety_checker=False)
    there.scheduler = diffusers.DDIMScheduler.from_config(there.scheduler.config, clip_sample=False)
    there.set_progress_bar_config(disable=True)
    if isinstance(heads := there.unet.config.attention_head_dim, tuple):
        there.unet.register_to_config(attention_head_dim=heads[-1])  # SAG's knows no tuples
    pipe, params = getattr(flaxdiff, name).from_pretrained(peers.saved(build))
    scheduler = flaxdiff.DDIMScheduler.from_config(pipe.scheduler, clip_sample=False)
    pipe = pipe.replace(scheduler=scheduler, progress=False)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)  # whatever ran before
    module = __import__(type(there).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: peers.nchw(noise))
    options = {**TEXT, "negative_prompt": ["b", "b"], "num_inference_steps": 4, "output_type": "np", **options}
    with torch.no_grad():
        wanted = there(**options, latents=peers.nchw(noise), **(theirs or {})).images
    run = functools.partial(pipe, params, KEY, latents=noise)
    return run(**{**options, **(ours or {})}).images, wanted, lambda **other: run(**{**options, **other}).images


@pytest.mark.parametrize("options", [dict(), dict(guidance_scale=1.0, negative_prompt=None)])
@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_2])
def test_self_attention_guidance(build, options, monkeypatch):
    name = "StableDiffusionSAGPipeline"
    ours, theirs, other = both(name, build, monkeypatch, {"sag_scale": 0.9, **options})
    assert peers.relative(ours, theirs, of=name) < 5e-3
    assert peers.relative(ours, other(sag_scale=0.0)) > 1e-3


@pytest.mark.filterwarnings("ignore:The prompt is longer")
@pytest.mark.parametrize("level", ["WEAK", "MEDIUM", "STRONG", "MAX"])
def test_safe_latent_diffusion(level, monkeypatch):
    name, build = "StableDiffusionPipelineSafe", peers.stable_diffusion_1
    options = dict(getattr(flaxdiff.SafetyConfig, level)) | {"sld_warmup_steps": 1}
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    assert dict(getattr(flaxdiff.SafetyConfig, level)) == getattr(SafetyConfig, level)
    ours, theirs, other = both(name, build, monkeypatch, options)
    assert peers.relative(ours, theirs, of=name) < 1e-3
    assert peers.relative(ours, other(sld_guidance_scale=0.0, sld_momentum_scale=0.0)) > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        dict(editing_prompt="d", edit_warmup_steps=1),
        dict(
            editing_prompt=["d", "red e"],
            reverse_editing_direction=[False, True],
            edit_guidance_scale=[4.0, 6.0],
            edit_warmup_steps=[0, 2],
            edit_cooldown_steps=[3, 9],
            edit_threshold=[0.9, 0.7],
            edit_weights=[1.0, 0.5],
            edit_momentum_scale=0.3,
            edit_mom_beta=0.6,
        ),
        dict(editing_prompt=["d", "f"], edit_warmup_steps=[0, 9]),
    ],
)
def test_semantic_guidance(options, monkeypatch):
    name, build = "SemanticStableDiffusionPipeline", peers.stable_diffusion_1
    ours, theirs, other = both(name, build, monkeypatch, options)
    assert peers.relative(ours, theirs, of=name) < 1e-3
    assert peers.relative(ours, other(editing_prompt=None)) > 1e-3
    if isinstance(options["editing_prompt"], list):
        with pytest.raises(ValueError, match="edit_threshold has 3 values for 2 prompts"):
            other(edit_threshold=[0.1, 0.2, 0.3])


@pytest.mark.parametrize("thresholds", [{}, {0: 0.02, 2: 0.5}])
def test_attend_and_excite(thresholds, monkeypatch):
    """diffusers keeps the maps of one resolution, which it is told; here it is the next to a quarter of the sides."""
    name, build = "StableDiffusionAttendAndExcitePipeline", peers.stable_diffusion_1
    options = dict(token_indices=[[1], [1]], thresholds=thresholds, max_iter_to_alter=3, scale_factor=40)
    ours, theirs, other = both(name, build, monkeypatch, options, theirs={"attn_res": (4, 4)})
    assert peers.relative(ours, theirs, of=name) < 5e-3
    assert peers.relative(ours, other(max_iter_to_alter=0, thresholds={})) > 1e-3
    for wrong, message in [
        ([0], "0 is no place"),
        ([[1], [9]], "9 is no place"),
        ([[1]] * 3, "3 lists for 2"),
        (None, "needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            other(token_indices=wrong)


def alike(guidance_scale, cross_attention_guidance_amount=0.1):
    return chain(cfg(guidance_scale), guidance.pix2pix_zero(cross_attention_guidance_amount))


def test_pix2pix_zero():
    """Against the gradient of the distance between PyTorch's maps of attention, kept by its processors."""
    pipe, params = load(peers.stable_diffusion_1, "StableDiffusionPipeline")
    there, noise = peers.stable_diffusion_1(), rng.standard_normal((1, 8, 8, 4)).astype(np.float32)
    options = dict(latents=np.repeat(noise, 2, 0), num_inference_steps=2, height=16, width=16, guidance_scale=1.0)
    inputs = pipe.prepare_inputs(prompt=["a cat", "a dog"], **options)
    told = pipe.replace(guidance=alike).prepare_inputs(
        prompt=["a cat", "a dog"], cross_attention_guidance_amount=20.0, **options
    )
    program = pipe.replace(guidance=alike).program
    conditions, state = program.begin(params, KEY, told)

    class Keeping:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            q, context = (
                attn.to_q(hidden_states),
                hidden_states if encoder_hidden_states is None else encoder_hidden_states,
            )
            q, k, v = (attn.head_to_batch_dim(a) for a in (q, attn.to_k(context), attn.to_v(context)))
            found = attn.get_attention_scores(q, k)
            if encoder_hidden_states is not None:
                maps.append(found.unflatten(0, (2, -1)))
            return attn.to_out[0](attn.batch_to_head_dim(found @ v))

    maps = []
    there.unet.set_attn_processor(Keeping())
    x = peers.nchw(np.asarray(state.sampler.scaled(state.sampler.sample))).requires_grad_()
    text = there.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0]
    there.unet(x, float(inputs["plan"].timesteps[0]), text)
    sum((m - m[:1].detach()).square().sum((2, 3)).mean(1).sum() for m in maps).backward()
    scale = np.asarray(state.sampler.scaled(np.ones(1, np.float32)))
    expected = np.asarray(state.sampler.sample) - 20 * scale * peers.nhwc(x.grad)

    evaluate = jax.jit(lambda params: program.guess(params, conditions, state)[1].sampler.sample)
    ours = np.asarray(evaluate(params))
    assert peers.relative(ours, expected) < 1e-4
    np.testing.assert_allclose(ours[0], np.asarray(state.sampler.sample)[0], atol=1e-6)
    assert peers.relative(ours[1], np.asarray(state.sampler.sample)[1]) > 1e-3


def test_reference_only():
    """Whoever sees the first image is changed by it, and that image is not."""
    pipe, params = load(peers.stable_diffusion_1, "StableDiffusionPipeline")
    referring = pipe.replace(guidance=refer)
    options = dict(prompt=["a cat", "a dog"], num_inference_steps=2, height=16, width=16, guidance_scale=3.0)
    plain = guess_of(pipe, params, pipe.prepare_inputs(**options))
    guess = [guess_of(referring, params, referring.prepare_inputs(reference_scale=s, **options)) for s in (0.0, 1.0)]
    np.testing.assert_allclose(guess[0], plain, atol=1e-5)
    np.testing.assert_allclose(guess[1][0], plain[0], atol=1e-5)
    assert peers.relative(guess[1][1], plain[1]) > 1e-3


def refer(guidance_scale, reference_scale=1.0, layers=guidance.Layers(["block"])):
    return chain(cfg(guidance_scale), guidance.reference(reference_scale, layers))


def test_any_loss_guides():
    """In the direction of its slope, whatever the network predicts."""
    for build in (peers.stable_diffusion_1, peers.stable_diffusion_2):
        pipe, params = load(build, "StableDiffusionPipeline")
        pipe = pipe.replace(
            guidance=darker, scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler), progress=False
        )
        bright = [
            pipe(params, KEY, prompt=["a", "b"], num_inference_steps=4, output_type="np", scale=scale).images.mean()
            for scale in (-40.0, 0.0, 40.0)
        ]
        assert bright[0] > bright[1] + 1e-3 and bright[1] > bright[2] + 1e-3


def test_prompt_to_prompt():
    """The example of the docs: where no word is looked for, all images are the first; where all are, each its own."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
    from prompt_to_prompt import prompt_to_prompt

    pipe, params = load(peers.stable_diffusion_1, "StableDiffusionPipeline")
    noise = np.repeat(rng.standard_normal((1, 8, 8, 4)).astype(np.float32), 2, 0)
    options = dict(prompt=["a cat", "a dog"], latents=noise, num_inference_steps=2, height=16, width=16)
    plain = guess_of(pipe, params, pipe.prepare_inputs(**options))
    held = pipe.replace(guidance=prompt_to_prompt([2]))
    guess = {t: guess_of(held, params, held.prepare_inputs(threshold=t, **options)) for t in (-1.0, 0.99, 2.0)}
    np.testing.assert_allclose(guess[-1.0], plain, atol=1e-5)
    np.testing.assert_allclose(guess[2.0], np.repeat(plain[:1], 2, 0), atol=1e-5)
    same = np.isclose(guess[0.99][1], plain[0], atol=1e-5).all(-1)
    assert 0 < same.sum() < same.size


def darker(guidance_scale, scale=0.0):
    return chain(
        cfg(guidance_scale), guidance.by_loss(lambda pictures: pictures.mean((1, 2, 3)), scale, of_pictures=True)
    )


@pytest.mark.parametrize("options", [dict(width=40), dict(width=32, circular_padding=True), dict(height=24, width=16)])
def test_panorama(options, monkeypatch):
    """diffusers' windows are those of Stable Diffusion 1; here they are those of the network."""
    cls = diffusers.StableDiffusionPanoramaPipeline
    shrunk = lambda self, h, w, circular_padding: plain(self, 4 * h, 4 * w, 8, 1, circular_padding)
    plain = cls.get_views
    monkeypatch.setattr(cls, "get_views", shrunk)
    name, build = "StableDiffusionPanoramaPipeline", peers.stable_diffusion_1
    options = (
        dict(height=16, prompt="a cat", negative_prompt="b") | options
    )  # of one: it pairs those of several wrongly
    shape = (1, options["height"] // 2, options["width"] // 2, 4)
    ours, theirs, other = both(name, build, monkeypatch, options, shape=shape)
    assert peers.relative(ours, theirs, of=name) < 1e-3
    with pytest.raises(ValueError, match="height=17"):
        other(height=17)
