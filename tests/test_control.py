"""ControlNets, T2I-Adapters and IP-Adapters against PyTorch's, alone and in whole pipelines."""

import collections
import sys

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch
from PIL import Image

import flaxdiff
from flaxdiff.checkpoint import convert

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
uniform = lambda *shape: rng.random(shape, np.float32)
KEY = jax.random.key(0)


def saved(model, folder):
    """A PyTorch model as ours: (spec, params)."""
    model.save_pretrained(folder)
    return getattr(flaxdiff, type(model).__name__).from_pretrained(folder)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("build", [peers.stable_diffusion_1, peers.stable_diffusion_xl])
def test_controlnet(build, pooled, tmp_path):
    """Alone, and what the U-Net makes of it."""
    unet = build().unet
    peer = peers.controlnet(unet, controlnet_conditioning_channel_order="bgr" if pooled else "rgb")
    peer.register_to_config(global_pool_conditions=pooled)
    (spec, params), (unet_spec, unet_params) = saved(peer, tmp_path / "c"), saved(unet, tmp_path / "u")
    x, t, text = normal(2, 10, 8, 4), np.float32([3, 981]), normal(2, 5, spec.config.cross_attention_dim)
    image, added = uniform(2, 20, 16, 3), None
    if spec.config.addition_embed_type:
        added = {"text_embeds": normal(2, 24), "time_ids": np.float32(rng.integers(0, 999, (2, 6)))}
    there = added and {k: torch.tensor(v) for k, v in added.items()}
    with torch.no_grad():
        args = peers.nchw(x), torch.tensor(t), torch.tensor(text)
        down, mid = peer(*args, peers.nchw(image), 0.7, added_cond_kwargs=there, guess_mode=True, return_dict=False)
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        theirs = unet(*args, added_cond_kwargs=there, **residuals).sample

    @jax.jit
    def run(params, unet_params, guess_mode):
        out = flaxdiff.apply(spec, params, x, t, text, image, 0.7, added, guess_mode)
        more = dict(down_block_additional_residuals=out[0], mid_block_additional_residual=out[1])
        return out, flaxdiff.apply(unet_spec, unet_params, x, t, text, added, **more)

    out, ours = run(params, unet_params, True)
    for mine, its in zip((*out.down_block_res_samples, out.mid_block_res_sample), (*down, mid), strict=True):
        assert peers.relative(mine, peers.nhwc(its), of=type(peer).__name__) < 1e-4
    assert peers.relative(ours, peers.nhwc(theirs)) < 1e-4


def test_controlnet_from_unet():
    """Adds nothing before it is trained, and holds the U-Net's first half."""
    pipe, params = flaxdiff.load()
    spec, mine = flaxdiff.ControlNetModel.from_unet(pipe.unet, params["unet"], KEY)
    x, text = normal(1, 8, 8, spec.config.in_channels), normal(1, 5, spec.config.cross_attention_dim)
    out = flaxdiff.apply(spec, mine, x, 10, text, uniform(1, 64, 64, 3))
    assert not any(np.any(np.asarray(r)) for r in out.down_block_res_samples)
    same = [name for name in mine if name in params["unet"]]
    assert len(same) > 50 and all((mine[name] == params["unet"][name]).all() for name in same)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full_adapter", {}),
        ("full_adapter_xl", {"channels": [8, 16, 24, 24], "in_channels": 1}),
        ("light_adapter", {"channels": [8, 16]}),
    ],
)
def test_t2i_adapter(kind, options, tmp_path):
    peer = peers.adapter(kind, **options)
    spec, params = saved(peer, tmp_path)
    picture = uniform(2, 20, 12, spec.config.in_channels)
    with torch.no_grad():
        theirs = peer(peers.nchw(picture))
    ours = jax.jit(lambda params: flaxdiff.apply(spec, params, picture))(params)
    for mine, its in zip(ours, theirs, strict=True):
        assert peers.relative(mine, peers.nhwc(its), of=type(peer).__name__) < 1e-4


XL = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
FULL = [
    ("ControlNetModel", dict(cross_attention_dim=768)),
    ("ControlNetModel", XL),
    ("ControlNetXSAdapter", dict()),
    (
        "ControlNetXSAdapter",
        dict(
            block_out_channels=(32, 64, 128),
            base_block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            num_attention_heads=(1, 1, 2),
            cross_attention_dim=2048,
            learn_time_embedding=True,
        ),
    ),
    ("T2IAdapter", dict()),
    ("T2IAdapter", dict(adapter_type="full_adapter_xl", downscale_factor=16)),
    ("T2IAdapter", dict(adapter_type="light_adapter", channels=(320, 640, 1280), num_res_blocks=4)),
]


@pytest.mark.parametrize(("name", "config"), FULL)
def test_full_size(name, config):
    """Names and shapes of the published sizes are those of PyTorch's class, without memory."""
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in getattr(diffusers, name)(**config).state_dict().items()}
    layout = flaxdiff.layout(getattr(flaxdiff, name).from_config(config))
    ours = {n: convert.shape_in_file(leaf) for own, leaf in layout.items() for n in convert.names_in_file(own, leaf)}
    assert ours == theirs


# --- whole pipelines -------------------------------------------------------------------------------------------------

BASES = {"StableDiffusion": peers.stable_diffusion_1, "StableDiffusionXL": peers.stable_diffusion_xl}
TEXT = dict(prompt=["a red dog", "cat"], negative_prompt=["ugly", "ugly"], num_inference_steps=4, guidance_scale=5.0)
Pair = collections.namedtuple("Pair", "pipe params peer")


def pair(name, folder, **steers):
    """A pipeline of a base and PyTorch networks that steer it, here and there; the VAE draws without spread."""
    base = BASES[name.split("Pipeline")[0].split("ControlNet")[0].split("Adapter")[0]]
    parts = {k: v for k, v in base().components.items() if k != "image_encoder"}
    checker = {} if "XL" in name else {"requires_safety_checker": False}
    given = {k: diffusers.MultiAdapter(v) if k == "adapter" and isinstance(v, list) else v for k, v in steers.items()}
    peer = getattr(diffusers, name)(**parts, **checker, **given)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    peer.text_encoder.__dict__["text_model"] = peer.text_encoder  # diffusers looks for it where transformers 4 had it
    ours = {}
    for component, nets in steers.items():
        several = [
            saved(net, folder / f"{component}{i}") for i, net in enumerate(nets if isinstance(nets, list) else [nets])
        ]
        ours[component] = several if isinstance(nets, list) else several[0]
    pipe, params = getattr(flaxdiff, name).from_pretrained(peers.saved(base), **ours)
    pipe = pipe.replace(progress=False, scheduler=flaxdiff.DDIMScheduler.from_config(pipe.scheduler))
    params["vae"]["quant_conv.bias"] = params["vae"]["quant_conv.bias"].at[4:].add(-60)
    with torch.no_grad():
        peer.vae.quant_conv.bias[4:] -= 60
    return Pair(pipe, params, peer)


def compare(pair, options, noise, monkeypatch, **pictures):
    """Largest difference of the pictures made as a share of the largest value; pictures go to PyTorch as tensors."""
    pipe, params, peer = pair
    module = sys.modules[type(peer).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: peers.nchw(noise))
    there = {k: [peers.nchw(p) for p in v] if isinstance(v, list) else peers.nchw(v) for k, v in pictures.items()}
    with torch.no_grad():
        theirs = peer(**options, **there, output_type="np").images
    ours = pipe(params, KEY, **options, **pictures, latents=noise, output_type="np").images
    return peers.relative(ours, theirs, of=type(pipe).__name__)


@pytest.mark.parametrize("base", ["StableDiffusion", pytest.param("StableDiffusionXL", marks=pytest.mark.slow)])
def test_controlnet_inpaints(base, tmp_path, monkeypatch):
    """By blending, and of a part around the mask, for which the control image is cut as well."""
    one = peers.controlnet(BASES[base]().unet)
    single = pair(f"{base}ControlNetInpaintPipeline", tmp_path, controlnet=one)
    mask = np.zeros((2, 16, 16, 1), np.float32)
    mask[:, 4:11, 3:14] = 1
    starts = dict(image=uniform(2, 16, 16, 3), control_image=uniform(2, 16, 16, 3), mask_image=mask)
    options = TEXT | dict(strength=0.7, control_guidance_end=0.7, height=16, width=16)
    assert compare(single, options, normal(2, 8, 8, 4), monkeypatch, **starts) < 1e-3
    picture, control = (Image.fromarray(rng.integers(0, 255, (24, 30, 3), np.uint8)) for _ in range(2))
    mask = Image.new("L", (30, 24))
    mask.paste(255, (10, 8, 16, 13))
    options |= dict(prompt="cat", negative_prompt="ugly", image=picture, mask_image=mask, control_image=control)
    options |= dict(padding_mask_crop=2)
    noise = normal(1, 8, 8, 4)
    monkeypatch.setattr(sys.modules[type(single.peer).__module__], "randn_tensor", lambda *a, **k: peers.nchw(noise))
    with torch.no_grad():
        theirs = single.peer(**options).images[0]
    ours = single.pipe(single.params, KEY, **options, latents=noise).images[0]
    assert np.abs(np.int32(ours) - np.int32(theirs)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_controlnet_pipelines(base, tmp_path, monkeypatch):
    """Two nets with scales and windows of their own, then image to image; guess mode."""
    unet = BASES[base]().unet
    one, other = (peers.controlnet(unet, seed) for seed in (0, 1))
    both = pair(f"{base}ControlNetPipeline", tmp_path, controlnet=[one, other])
    noise, pictures = normal(2, 8, 8, 4), [uniform(2, 16, 16, 3), uniform(1, 16, 16, 3)]
    weights = dict(
        controlnet_conditioning_scale=[0.7, 1.5], control_guidance_start=[0.0, 0.25], control_guidance_end=[0.5, 1.0]
    )
    for more in (weights, dict(guess_mode=True)):
        assert compare(both, TEXT | more, noise, monkeypatch, image=pictures) < 1e-3
    single = pair(f"{base}ControlNetImg2ImgPipeline", tmp_path, controlnet=one)
    options = TEXT | dict(strength=0.6, control_guidance_end=0.5)
    starts = dict(image=uniform(2, 16, 16, 3), control_image=uniform(2, 16, 16, 3))
    assert compare(single, options, noise, monkeypatch, **starts) < 1e-3
    assert compare(single, options | dict(guess_mode=True), noise, monkeypatch, **starts) < 1e-3


@pytest.mark.parametrize("base", BASES)
def test_adapter_pipelines(base, tmp_path, monkeypatch):
    kind = "full_adapter" if base == "StableDiffusion" else "full_adapter_xl"
    # the stages that attend come first in the one U-Net and last in the other
    options = {} if base == "StableDiffusion" else {"channels": [16, 32, 32], "downscale_factor": 4}
    noise, pictures = normal(2, 8, 8, 4), [uniform(2, 16, 16, 3), uniform(2, 16, 16, 3)]
    both = pair(f"{base}AdapterPipeline", tmp_path, adapter=[peers.adapter(kind, i, **options) for i in (0, 1)])
    weights = dict(adapter_conditioning_scale=[0.7, 0.4])
    if base == "StableDiffusionXL":
        weights["adapter_conditioning_factor"] = 0.5
    size = dict(height=16, width=16)
    assert compare(both, TEXT | weights | size, noise, monkeypatch, image=pictures) < 1e-3


@pytest.mark.parametrize("base", BASES)
def test_the_class_for_a_task_led_by_controlnets(base, tmp_path):
    """As diffusers' AutoPipeline chooses: by what is given, or else as the pipeline at hand."""
    net = saved(peers.controlnet(BASES[base]().unet), tmp_path)
    tasks = {"Text2Image": "", "Image2Image": "Img2Img", "Inpainting": "Inpaint"}
    for task, suffix in tasks.items():
        auto = getattr(flaxdiff, f"AutoPipelineFor{task}")
        pipe, params = auto.from_pretrained(peers.saved(BASES[base]), controlnet=net)
        assert type(pipe).__name__ == f"{base}ControlNet{suffix}Pipeline" and "controlnet" in params
        plain = auto.from_pipe(pipe, controlnet=None)
        assert type(plain).__name__ == f"{base}{suffix}Pipeline" and "controlnet" not in dict(plain.specs)
        again = auto.from_pipe(plain, controlnet=net[0])
        assert again == pipe == auto.from_pipe(pipe)
    assert not hasattr(flaxdiff.AutoPipelineForText2Image, "family")


# --- ControlNet-XS ---------------------------------------------------------------------------------------------------

TWO = dict(layers_per_block=2, norm_num_groups=8)  # as many blocks as its authors' networks have
TALL = dict(
    TWO,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 48,
    cross_attention_dim=32,
)


def xs(base, **options):
    """PyTorch's pipeline with a ControlNet-XS; what begins at zero is drawn, so that there is something to compare."""
    parts = {k: v for k, v in BASES[base]().components.items() if k != "image_encoder"}
    parts["unet"] = peers.unet(**(TALL if "XL" in base else TWO))
    torch.manual_seed(1)
    options = dict(size_ratio=0.5, conditioning_embedding_out_channels=(8, 16), num_attention_heads=2) | options
    parts["controlnet"] = diffusers.ControlNetXSAdapter.from_unet(parts["unet"], **options).eval()
    for name, p in parts["controlnet"].named_parameters():
        if "_to_" in name or "embedding.conv_out" in name:
            torch.nn.init.normal_(p, std=0.2)
    peer = getattr(diffusers, f"{base}ControlNetXSPipeline")(**parts)
    peer.unet.eval()
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    peer.text_encoder.__dict__["text_model"] = peer.text_encoder  # diffusers looks for it where transformers 4 had it
    return peer, parts


@pytest.mark.parametrize("base", BASES)
def test_controlnet_xs(base, tmp_path, monkeypatch):
    """A U-Net and its adapter as one, from a folder that holds them so; with a scale and a window."""
    learned = dict(learn_time_embedding=True, time_embedding_mix=0.7) if "XL" in base else {}
    peer, parts = xs(base, **learned)
    peer.save_pretrained(tmp_path / "whole")
    pipe, params = flaxdiff.load(tmp_path / "whole")
    assert type(pipe).__name__ == type(peer).__name__ and pipe.unet.module is flaxdiff.UNet2DConditionModel
    both = Pair(pipe.replace(progress=False), params, peer)
    for name in ("unet", "controlnet"):  # the same as each from a folder of its own
        spec, own = saved(parts[name], tmp_path / name)
        assert spec == dict(pipe.specs)[name]
        assert own.keys() == params[name].keys() and all((own[k] == params[name][k]).all() for k in own)

    x, t, picture = normal(2, 8, 8, 4), np.float32([3, 981]), uniform(2, 16, 16, 3)
    text = normal(2, 5, spec.config.cross_attention_dim)
    added = {"text_embeds": normal(2, 24), "time_ids": np.float32(rng.integers(0, 999, (2, 6)))}
    added = added if "XL" in base else None
    there = added and {k: torch.tensor(v) for k, v in added.items()}
    with torch.no_grad():
        args = peers.nchw(x), torch.tensor(t), torch.tensor(text), peers.nchw(picture), 0.7
        theirs = peer.unet(*args, added_cond_kwargs=there).sample
    fused = flaxdiff.UNetControlNetXSModel.joined(pipe.unet, pipe.controlnet)
    own = {f"{at}.{k}": v for at, n in (("base", "unet"), ("ctrl", "controlnet")) for k, v in params[n].items()}

    @jax.jit
    def run(own):
        condition = flaxdiff.apply(fused, own, picture, method="condition")
        return flaxdiff.apply(fused, own, x, t, text, added, condition=condition, scale=0.7)

    for cls in (flaxdiff.UNetControlNetXSModel, flaxdiff.ControlNetXSAdapter):
        assert peers.relative(run(own), peers.nhwc(theirs), of=cls.__name__) < 1e-4

    noise = normal(2, 8, 8, 4)
    window = dict(control_guidance_start=0.25, control_guidance_end=0.75, controlnet_conditioning_scale=0.8)
    for more in ({}, window):
        assert compare(both, TEXT | more, noise, monkeypatch, image=picture) < 1e-3

    flaxdiff.save(tmp_path / "ours", pipe, params)
    again = type(peer).from_pretrained(tmp_path / "ours")
    again.unet.eval()
    state = again.unet.state_dict()
    assert all(torch.equal(weight, state[key]) for key, weight in peer.unet.state_dict().items())


def test_controlnet_xs_refuses():
    pipe, params = flaxdiff.load()
    net = flaxdiff.ControlNetXSAdapter
    with pytest.raises(ValueError, match="either size_ratio or block_out_channels"):
        net.from_unet(pipe.unet, params["unet"], KEY)
    with pytest.raises(
        ValueError, match=r"for a U-Net of \(320, .*\) channels, and the pipeline's has \(64, 96, 128\)"
    ):
        flaxdiff.UNetControlNetXSModel.joined(pipe.unet, net.from_config({}))


def test_nothing_recompiles(tmp_path):
    """The picture, its scale, its window and guess mode are values."""
    unet = peers.stable_diffusion_1().unet
    pipe, params, _ = pair("StableDiffusionControlNetPipeline", tmp_path, controlnet=peers.controlnet(unet))
    run = lambda **options: pipe(params, KEY, **(TEXT | options), output_type="np").images
    picture = uniform(1, 16, 16, 3)
    first, before = run(image=picture), peers.programs()
    changes = (
        dict(image=1 - picture),
        dict(image=picture, controlnet_conditioning_scale=0.3),
        dict(image=picture, control_guidance_start=0.5),
        dict(image=picture, control_guidance_end=0.5, num_inference_steps=3),
        dict(image=picture, guess_mode=True),
    )
    assert all(np.abs(run(**change) - first).max() > 1e-4 for change in changes)
    assert peers.programs() == before


def test_folders_of_several_nets(tmp_path):
    """A folder that PyTorch wrote loads here, and one of ours there."""
    base = peers.stable_diffusion_1()
    nets = [peers.controlnet(base.unet, seed) for seed in (0, 1)]
    peer = diffusers.StableDiffusionControlNetPipeline(
        **base.components, controlnet=nets, requires_safety_checker=False
    )
    peer.save_pretrained(tmp_path / "theirs")
    pipe, params = flaxdiff.load(tmp_path / "theirs")
    assert type(pipe).__name__ == type(peer).__name__ and {"controlnet", "controlnet_1"} <= set(params)
    flaxdiff.save(tmp_path / "ours", pipe, params)
    several = flaxdiff.MultiControlNetModel.from_pretrained(tmp_path / "theirs" / "controlnet")
    assert [spec for spec, _ in several] == [pipe.controlnet, pipe.controlnet_1]
    assert all((several[1][1][name] == array).all() for name, array in params["controlnet_1"].items())
    again = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "ours")
    for mine, its in zip(again.controlnet.nets, nets, strict=True):
        assert all((p == q).all() for p, q in zip(mine.parameters(), its.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "follows a picture; give image="),
        (
            dict(image=uniform(1, 16, 14, 3), height=16, width=16),
            r"shape \(1, 16, 14, 3\); .* \[B, 16, 16, 3\]: resize",
        ),
        (dict(image=uniform(3, 16, 16, 3)), "controlnet_image has 3 entries|entries for 3 prompts"),
        (
            dict(image=[uniform(1, 16, 16, 3)] * 2, controlnet_conditioning_scale=[1.0, 1.0]),
            "2,. numbers for 1 networks",
        ),
        (dict(image=uniform(1, 16, 16, 3), control_guidance_start=0.8, control_guidance_end=0.2), "from 0.8.* to 0.2"),
    ],
)
def test_bad_control(options, message):
    spec = flaxdiff.ControlNetModel.from_config({"block_out_channels": [32], "down_block_types": ["DownBlock2D"]})
    pipe, _ = flaxdiff.StableDiffusionControlNetPipeline.from_pretrained(flaxdiff.EMOJI, controlnet=(spec, {}))
    with pytest.raises(ValueError, match=message):
        pipe.prepare_inputs(**TEXT, **options)


def test_bad_components():
    with pytest.raises(ValueError, match="controlnet= is a str; give"):
        flaxdiff.StableDiffusionControlNetPipeline.from_pretrained(flaxdiff.EMOJI, controlnet="edges")
    pipe, _ = flaxdiff.StableDiffusionControlNetPipeline.from_pretrained(flaxdiff.EMOJI)
    with pytest.raises(ValueError, match="no network to steer it; load it with controlnet="):
        pipe.prepare_inputs(prompt="cat", image=uniform(1, 64, 64, 3))
