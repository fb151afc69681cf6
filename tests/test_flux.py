"""Flux against PyTorch: its transformer, and every pipeline of it."""

import copy
import functools
import sys

import diffusers
import gguf
import jax
import numpy as np
import peers
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils
from diffusers.loaders.lora_conversion_utils import swap_scale_shift
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image

import flaxdiff
from flaxdiff import registry
from flaxdiff.checkpoint import original
from flaxdiff.pipelines.tasks import blank_inputs

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
SIZES = dict(num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=12, axes_dims_rope=(4, 4, 4))
SIZES |= dict(in_channels=16, joint_attention_dim=24, pooled_projection_dim=16)
KEY = jax.random.key(0)


@functools.cache
def transformer(**options):
    torch.manual_seed(0)
    return peers.lively(diffusers.FluxTransformer2DModel(**SIZES | options))


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scan", "guided", "repeat"), [(True, True, False), (False, False, True)])
def test_transformer(scan, guided, repeat, tmp_path):
    """With what ControlNets add; and all times at once are each of them."""
    peer = transformer(guidance_embeds=guided)
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.FluxTransformer2DModel.from_pretrained(tmp_path, scan_layers=scan)
    x, text, pooled, t, ids = normal(2, 6, 16), normal(2, 5, 24), normal(2, 16), np.float32([0.3, 0.9]), normal(6, 3)
    added = normal(1 + repeat, 2, 6, 24), normal(2, 2, 6, 24)
    strength = np.float32([3.5, 1.5]) if guided else None
    there = functools.partial(torch.tensor)
    with torch.no_grad():
        theirs = peer(
            *map(there, (x, text, pooled, t, ids)),
            txt_ids=torch.zeros(5, 3),
            guidance=None if strength is None else there(strength),
            controlnet_block_samples=list(there(added[0])),
            controlnet_single_block_samples=list(there(added[1])),
            controlnet_blocks_repeat=repeat,
        ).sample

    @jax.jit
    def run(params, t, pooled, strength):
        rest = ids, None, strength, *added, repeat
        return flaxdiff.apply(spec, params, x, text, pooled, t, *rest)

    ours = run(params, t, pooled, strength)
    assert peers.relative(ours, theirs, of="FluxTransformer2DModel") < 1e-4
    several = np.float32([[0.1], [0.7]])
    told = flaxdiff.apply(spec, params, several, pooled, strength, method="times")
    assert (
        peers.relative(run(params, jax.tree.map(lambda a: a[1], told), None, None), run(params, 0.7, pooled, strength))
        < 1e-5
    )


@functools.cache
def controlnet(**options):
    """A ControlNet, with what begins at zero drawn, so that there is something to compare."""
    sizes = SIZES | dict(num_layers=1, num_single_layers=2, guidance_embeds=True)
    return peers.lively(diffusers.FluxControlNetModel(**sizes | options))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("union", [True, False])
def test_controlnet(union, scan, tmp_path):
    """A union of kinds that reads latents, and one that reads pictures and has no single blocks."""
    own = dict(num_mode=3, num_layers=2) if union else dict(conditioning_embedding_channels=4, patch_size=2)
    peer = controlnet(**own | ({} if union else dict(num_single_layers=0)))
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.FluxControlNetModel.from_pretrained(tmp_path, scan_layers=scan)
    x, text, pooled, t, ids = normal(2, 6, 16), normal(2, 5, 24), normal(2, 16), np.float32([0.3, 0.9]), normal(6, 3)
    control, strength = normal(2, 6, 16) if union else normal(2, 32, 48, 3), np.float32([3.5, 1.5])
    mode = np.int32([2, 0]) if union else None
    with torch.no_grad():
        there = dict(encoder_hidden_states=text, pooled_projections=pooled, timestep=t, img_ids=ids, guidance=strength)
        theirs = peer(
            torch.tensor(x),
            torch.tensor(control) if union else peers.nchw(control),
            torch.tensor(mode)[:, None].long() if union else None,
            0.7,
            txt_ids=torch.zeros(5, 3),
            **{k: torch.tensor(v) for k, v in there.items()},
        )
    run = functools.partial(flaxdiff.apply, spec, conditioning_scale=0.7, controlnet_mode=mode)
    ours = jax.jit(lambda params: run(params, x, control, text, pooled, t, ids, None, strength))(params)
    for mine, its in zip(ours, (theirs.controlnet_block_samples, theirs.controlnet_single_block_samples)):
        assert mine is None and its is None or peers.relative(mine, torch.stack(its), "FluxControlNetModel") < 1e-4


@pytest.mark.parametrize("preset", [pytest.param("fsdp=2+tp", marks=pytest.mark.slow), "fsdp=2+cp"])
def test_on_several_devices(preset):
    """Weights and pictures over some, heads or tokens over others: the numbers of one device."""
    sizes = SIZES | dict(num_attention_heads=4, num_layers=1, num_single_layers=2)
    spec, mesh = flaxdiff.FluxTransformer2DModel.from_config(sizes), flaxdiff.make_mesh(preset)
    params, ids = flaxdiff.init(spec, KEY), normal(16, 3)
    arrays = normal(2, 16, 16), normal(2, 8, 24), normal(2, 16), np.float32([0.3, 0.9])
    run = jax.jit(lambda params, *arrays: flaxdiff.apply(spec, params, *arrays, ids))
    alone = run(params, *arrays)
    split = flaxdiff.shardings(params, mesh)
    whole = [name for name, place in split.items() if place.is_fully_replicated]
    assert not [name for name in whole if "transformer_blocks" in name and ".norm_" not in name and "bias" not in name]
    with jax.set_mesh(mesh):
        several = run(flaxdiff.distribute(params, mesh), *flaxdiff.shard(arrays, mesh))
    assert peers.relative(several, alone) < 1e-5


def test_guidance_is_for_networks_that_were_distilled():
    spec = flaxdiff.FluxTransformer2DModel.from_config(SIZES)
    arrays = flaxdiff.abstract(spec), normal(1, 6, 16), normal(1, 5, 24), normal(1, 16), 0.5, normal(6, 3)
    with pytest.raises(ValueError, match="was not distilled with guidance .guidance_embeds.; leave guidance out"):
        jax.eval_shape(lambda params, *args: flaxdiff.apply(spec, params, *args, None, np.ones(1)), *arrays)


# --- the pipelines ---------------------------------------------------------------------------------------------------


def parts(**options):
    """The components of a Flux pipeline; options of its transformer."""
    vae = peers.vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False)
    return dict(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=peers.sure(vae),
        text_encoder=peers.lively(peers.text_encoder()),
        tokenizer=peers.tokenizer(),
        text_encoder_2=peers.t5_encoder(width=24),
        tokenizer_2=peers.t5_tokenizer(),
        transformer=transformer(**{"guidance_embeds": True} | options),
    )


@functools.cache
def folder(**options) -> str:
    """Where a pipeline of these parts was saved."""
    return peers.saved(functools.partial(diffusers.FluxPipeline, **parts(**options)))


def load(name, **options):
    """Our pipeline and PyTorch's, of the same components; options of the transformer."""
    pipe, params = getattr(flaxdiff, name).from_pretrained(folder(**options))
    peer = getattr(diffusers, name)(**parts(**options))
    peer.set_progress_bar_config(disable=True)
    return pipe.replace(progress=False), params, peer


def packed(x):
    """Latents [B, H, W, C] as PyTorch's tokens."""
    return diffusers.FluxPipeline._pack_latents(peers.nchw(x), len(x), x.shape[-1], *x.shape[1:3])


SMALL = dict(prompt=["a red dog", "cat"], max_sequence_length=12, num_inference_steps=2, height=16, width=24)
NOISE = normal(2, 8, 12, 4)


def agree(pipe, ours, theirs):
    assert peers.relative(ours, theirs, of=type(pipe).__name__) < 1e-3


@pytest.mark.parametrize("true", [False, True])
def test_text_to_image(true):
    """Also led away from a negative prompt; the strength of guidance, and that, are values of one program."""
    pipe, params, peer = load("FluxPipeline")
    options = SMALL | dict(guidance_scale=2.5)
    options |= TRUE | dict(negative_prompt_2=["bad", "red"]) if true else dict(prompt_2=["a", "bird"])
    ours = pipe(params, KEY, **options, latents=NOISE, output_type="np").images
    compiled = peers.programs()
    with torch.no_grad():
        theirs = peer(**options, latents=packed(NOISE), output_type="np").images
    agree(pipe, ours, theirs)
    other = options | dict(guidance_scale=5.0, num_inference_steps=3)
    assert np.abs(pipe(params, KEY, **other, latents=NOISE, output_type="np").images - ours).max() > 1e-3
    assert peers.programs() == compiled


IMAGE = rng.uniform(size=(1, 16, 24, 3)).astype(np.float32)
MASK = np.zeros((1, 16, 24, 1), np.float32)
MASK[:, 4:12, 6:18] = 1
OTHER = rng.uniform(size=(1, 20, 16, 3)).astype(np.float32)
SEES = dict(in_channels=32, out_channels=16)  # a control image beside the sample
START, PAINT, CONTROL = dict(image=IMAGE), dict(image=IMAGE, mask_image=MASK), dict(control_image=1 - IMAGE)
TRUE = dict(true_cfg_scale=3.0, negative_prompt=["ugly", "bad"])
ASKED = dict(_auto_resize=False, max_area=384)
# pipeline, what its transformer has, what a call is given beside the text; three steps, of which strength runs some
CASES = {
    "two of three": ("FluxImg2ImgPipeline", {}, dict(image=OTHER, strength=0.6)),
    "all": ("FluxImg2ImgPipeline", {}, START | dict(strength=1.0)),
    "inpaint": ("FluxInpaintPipeline", {}, PAINT | dict(strength=0.7)),
    "fill": ("FluxFillPipeline", dict(in_channels=48, out_channels=16), PAINT),
    "control": ("FluxControlPipeline", SEES, CONTROL),
    "control from a picture": ("FluxControlImg2ImgPipeline", SEES, START | CONTROL),
    "control and inpaint": ("FluxControlInpaintPipeline", SEES, PAINT | CONTROL),
    "kontext": ("FluxKontextPipeline", {}, dict(image=OTHER) | ASKED | TRUE),
    "kontext without": ("FluxKontextPipeline", {}, ASKED),
    "kontext and inpaint": ("FluxKontextInpaintPipeline", {}, PAINT | dict(_auto_resize=False, strength=0.7)),
    "kontext of another": (
        "FluxKontextInpaintPipeline",
        {},
        PAINT | dict(_auto_resize=False, image_reference=OTHER),
    ),
}


LED = {
    "FluxControlNetPipeline": TRUE | dict(control_guidance_end=0.7),
    "FluxControlNetImg2ImgPipeline": START | dict(strength=0.7),
    "FluxControlNetInpaintPipeline": PAINT | dict(strength=0.7),
}


@pytest.mark.parametrize("name", LED)
def test_led(name, monkeypatch, tmp_path):
    """By two ControlNets, of which one is a union; and by one alone."""
    nets = [controlnet(), controlnet(num_mode=3)]
    several = name == "FluxControlNetPipeline"
    nets = nets if several else nets[:1]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    ours = [flaxdiff.FluxControlNetModel.from_pretrained(tmp_path / str(i)) for i in range(len(nets))]
    pipe, params = getattr(flaxdiff, name).from_pretrained(folder(), controlnet=ours)
    peer = getattr(diffusers, name)(**parts(), controlnet=nets if several else nets[0])
    both = dict(control_image=[1 - IMAGE, IMAGE[:, :, ::-1].copy()], control_mode=[None, 2])
    control = both if several else CONTROL
    scale = [0.5, 0.8] if several else 0.6
    options = SMALL | dict(num_inference_steps=3, controlnet_conditioning_scale=scale) | control | LED[name]
    compare(name, pipe, params, peer, options, monkeypatch)


def test_control_latents_have_noise_of_their_own(tmp_path):
    """One net given twice sees the same picture under other noise; nets of other depths add as far as both go."""
    for i, net in enumerate([controlnet(), controlnet(num_layers=2, num_single_layers=0)]):
        net.save_pretrained(tmp_path / str(i))
    first, other = (flaxdiff.FluxControlNetModel.from_pretrained(tmp_path / str(i)) for i in range(2))
    led = lambda nets: flaxdiff.FluxControlNetPipeline.from_pretrained(folder(), controlnet=nets)
    told = dict(prompt="a", control_image=[IMAGE, IMAGE], num_inference_steps=2, height=16, width=24)
    pipe, params = led([first, first])
    spread = np.repeat(np.float32([0, 60]), pipe.vae.config.latent_channels)  # which other tests take away
    params["vae"]["encoder.conv_out.bias"] += spread
    conditions, _ = jax.jit(pipe.program.begin)(params, KEY, pipe.prepare_inputs(**told))
    seen = [conditions.branches["positive"][name]["condition"] for name in ("controlnet", "controlnet_1")]
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    for nets in ([first, other], [other, first]):
        pipe, params = led(nets)
        assert jax.eval_shape(pipe.generate, params, KEY, pipe.prepare_inputs(**told)).shape == (1, 16, 24, 3)


def test_inputs_of_blank_prompts(tmp_path):
    """As they are compiled for ahead of time: with a ControlNet, with a control image, with a picture to change."""
    controlnet().save_pretrained(tmp_path)
    net = flaxdiff.FluxControlNetModel.from_pretrained(tmp_path)
    led, _ = flaxdiff.FluxControlNetPipeline.from_pretrained(folder(), controlnet=net)
    size = dict(height=16, width=24)
    assert blank_inputs(led, 2, **size)["controlnet_image"].shape == (2, 16, 24, 3)
    assert blank_inputs(load("FluxControlPipeline", **SEES)[0], 2, **size)["beside_image"].shape == (2, 16, 24, 3)
    asked = ASKED | size
    assert blank_inputs(load("FluxKontextPipeline")[0], 2, **asked)["reference"].shape == (2, 16, 24, 3)


def compare(name, pipe, params, peer, options, monkeypatch):
    """A call of ours with that of PyTorch's, both with the same noise."""
    module = sys.modules[getattr(diffusers, name).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: peers.nchw(NOISE))
    peer.set_progress_bar_config(disable=True)
    ours = pipe.replace(progress=False)(params, KEY, **options, latents=NOISE, output_type="np").images
    tensors = [k for k, v in options.items() if isinstance(v, np.ndarray) and k != "control_image"]
    there = options | {k: peers.nchw(options[k]) for k in tensors}
    with torch.no_grad():
        theirs = peer(**there, output_type="np").images
    assert peers.relative(ours, theirs, of=name) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_tasks(case, monkeypatch):
    name, net, more = CASES[case]
    pipe, params, peer = load(name, **net)
    options = SMALL | dict(num_inference_steps=3) | more
    if name == "FluxKontextInpaintPipeline":  # the picture says how large
        del options["height"], options["width"]
    compare(name, pipe, params, peer, options, monkeypatch)


@pytest.mark.parametrize(
    ("name", "net", "options", "message"),
    [
        ("FluxPipeline", {}, dict(max_sequence_length=600), "max_sequence_length=600: Flux reads between 1 and 512"),
        ("FluxPipeline", {}, dict(height=18), "needs positive multiples of 4; the nearest are 16 and 24"),
        ("FluxPipeline", {}, dict(latents=NOISE[..., :2]), r"latents have shape .*expected \[B, \*\(8, 12, 4\)\]"),
        ("FluxControlPipeline", SEES, {}, "FluxControlPipeline follows a picture; give control_image="),
        ("FluxControlPipeline", {}, CONTROL, "4 channels of the sample and 4 beside it, but it takes 4"),
        ("FluxFillPipeline", {}, dict(image=IMAGE), "give both image= and mask_image= .mask_image is missing."),
    ],
)
def test_what_is_refused(name, net, options, message):
    pipe, _, _ = load(name, **net)
    with pytest.raises(ValueError, match=message):
        pipe.prepare_inputs(**SMALL | options)


@pytest.mark.parametrize(
    ("name", "purpose", "found"),
    [
        ("FluxPipeline", "image2image", "FluxImg2ImgPipeline"),
        ("FluxControlNetPipeline", "inpainting", "FluxControlNetInpaintPipeline"),
        ("FluxControlPipeline", "inpainting", "FluxControlInpaintPipeline"),
        ("FluxKontextPipeline", "image2image", "FluxKontextPipeline"),
        ("FluxFillPipeline", "inpainting", "FluxFillPipeline"),
    ],
)
def test_counterparts(name, purpose, found):
    assert registry.counterpart(name, purpose) == found


def test_embeddings_go_together():
    pipe, _, _ = load("FluxPipeline")
    with pytest.raises(ValueError, match="prompt_embeds and pooled_prompt_embeds go together"):
        pipe.prepare_inputs(prompt_embeds=normal(1, 5, 24))
    with pytest.raises(ValueError, match="The prompt has 5 tokens and its negative 512; give both as many"):
        given = dict(prompt_embeds=normal(1, 5, 24), pooled_prompt_embeds=normal(1, 16))
        pipe.prepare_inputs(**given, true_cfg_scale=2.0, negative_prompt="ugly")


def test_pytorch_reads_what_is_saved(tmp_path):
    """And a negative prompt without true_cfg_scale changes nothing, as there."""
    pipe, params, peer = load("FluxPipeline")
    flaxdiff.save(tmp_path / "saved", pipe, params)
    again = diffusers.FluxPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    with torch.no_grad():
        images = [p(**SMALL, latents=packed(NOISE), output_type="np").images for p in (peer, again)]
    np.testing.assert_allclose(*images, atol=1e-6)
    assert not any(name.startswith("negative_") for name in pipe.prepare_inputs(**SMALL, negative_prompt="ugly"))


def test_tiny_autoencoder():
    """TAEF1 in the place of the autoencoder: nothing else changes."""
    pipe, params, _ = load("FluxPipeline")
    tiny = dict(encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8], latent_channels=4)
    tiny |= dict(num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1])
    vae = flaxdiff.AutoencoderTiny.from_config(tiny)
    pipe, params = pipe.replace(vae=vae), {**params, "vae": flaxdiff.init(vae, KEY)}
    assert jax.eval_shape(pipe.generate, params, KEY, pipe.prepare_inputs(**SMALL)).shape == (2, 16, 24, 3)


# --- files of others -------------------------------------------------------------------------------------------------


def as_original(spec, state):
    """A state dict as Black Forest Labs name it, with what is one tensor there in one."""
    made = {}
    for name, old in original.names(spec, state).items():
        whole = original.whole(old)
        if whole == old:
            made[old] = state[name]
            continue
        parts = {n: o for n, o in original.names(spec, state).items() if original.whole(o) == whole}
        count = sum(len(state[n]) for n in parts)
        made[whole] = torch.zeros(count, *state[name].shape[1:])
        for n, o in parts.items():
            made[whole][original.rows(o, count)] = state[n]
    return made


def test_single_file(tmp_path):
    """The names of Black Forest Labs are what the converter of diffusers takes; alone, or as others wrap them."""
    with torch.device("meta"):  # it knows one width
        peer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        state = as_original(flaxdiff.FluxTransformer2DModel.from_config(dict(peer.config)), peer.state_dict())
    again = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in peer.state_dict().items()}

    spec, wanted = flaxdiff.FluxTransformer2DModel.from_pretrained(folder(), subfolder="transformer")
    own = transformer(guidance_embeds=True).state_dict()
    state = as_original(spec, own)
    turned = swap_scale_shift(own["norm_out.linear.weight"])
    assert (state["final_layer.adaLN_modulation.1.weight"] == turned).all()
    for prefix in ("", "model.diffusion_model."):
        path = tmp_path / "flux.safetensors"
        safetensors.torch.save_file({prefix + k: v.contiguous() for k, v in state.items()}, path)
        made, params = flaxdiff.FluxTransformer2DModel.from_single_file(path, axes_dims_rope=(4, 4, 4))
        assert made.replace(out_channels=None) == spec
        assert all((params[name] == wanted[name]).all() for name in wanted)

    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    for name, value in state.items():
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    _, params = flaxdiff.FluxTransformer2DModel.from_single_file(tmp_path / "flux.gguf", axes_dims_rope=(4, 4, 4))
    assert all((params[name] == wanted[name]).all() for name in wanted)


def far(spec, params, peer, channels=16):
    """How far a transformer is from PyTorch's on two pictures."""
    arrays = normal(2, 6, channels), normal(2, 5, 24), normal(2, 16), np.float32([0.3, 0.9]), normal(6, 3)
    places, strength = np.zeros((5, 3), np.float32), np.float32([3.5, 1.5])
    with torch.no_grad():
        theirs = peer(*map(torch.tensor, (*arrays, places, strength))).sample
    run = jax.jit(lambda params: flaxdiff.apply(spec, params, *arrays, places, strength))
    return peers.relative(run(params), theirs)


@pytest.mark.parametrize("form", ["kohya", "xlabs", "original", "diffusers"])
def test_lora(form, tmp_path):
    """Updates of fused projections are those of their parts; the numbers are those of weights that were merged."""
    peer = copy.deepcopy(transformer(guidance_embeds=True))
    state, rank, file = peer.state_dict(), 3, {}
    draw = lambda *shape: torch.tensor(normal(*shape)) / 4
    double, single = "transformer_blocks.1.", "single_transformer_blocks.2."
    fused = {  # module in the file -> ours
        "kohya": {
            "lora_unet_double_blocks_1_img_attn_qkv": [f"{double}attn.to_{x}" for x in "qkv"],
            "lora_unet_double_blocks_1_txt_mlp_0": [f"{double}ff_context.net.0.proj"],
            "lora_unet_single_blocks_2_linear1": [f"{single}attn.to_{x}" for x in "qkv"] + [f"{single}proj_mlp"],
            "lora_unet_single_blocks_2_modulation_lin": [f"{single}norm.linear"],
        },
        "xlabs": {
            "double_blocks.1.processor.qkv_lora2": [f"{double}attn.add_{x}_proj" for x in "qkv"],
            "double_blocks.1.processor.proj_lora1": [f"{double}attn.to_out.0"],
            "single_blocks.2.processor.qkv_lora": [f"{single}attn.to_{x}" for x in "qkv"],
        },
        "original": {
            "base_model.model.double_blocks.1.txt_attn.qkv": [f"{double}attn.add_{x}_proj" for x in "qkv"],
            "base_model.model.final_layer.linear": ["proj_out"],
        },
        "diffusers": {
            f"transformer.{double}attn.to_q": [f"{double}attn.to_q"],
            "transformer.x_embedder": ["x_embedder"],
        },
    }[form]
    down_key, up_key = {"kohya": ("lora_down", "lora_up"), "xlabs": ("down", "up")}.get(form, ("lora_A", "lora_B"))
    for key, modules in fused.items():
        counts = [len(state[f"{module}.weight"]) for module in modules]
        down, up = draw(rank, state[f"{modules[0]}.weight"].shape[1]), draw(sum(counts), rank)
        file |= {f"{key}.{down_key}.weight": down, f"{key}.{up_key}.weight": up}
        alpha = 1.5 if form == "kohya" else rank
        file |= {f"{key}.alpha": torch.tensor(alpha)} if form == "kohya" else {}
        for module, rows in zip(modules, up.split(counts)):
            state[f"{module}.weight"] += alpha / rank * rows @ down
    safetensors.torch.save_file(file, tmp_path / "lora.safetensors")
    pipe, params, _ = load("FluxPipeline")
    adapted = flaxdiff.load_lora(pipe, params, tmp_path / "lora.safetensors")
    peer.load_state_dict(state)
    assert far(pipe.transformer, adapted["transformer"], peer) < 1e-4
    assert far(pipe.transformer, params["transformer"], peer) > 1e-3


def test_control_lora(tmp_path):
    """A wider way in, biases, norms and updates of everything: the numbers of weights that were merged."""
    peer = transformer(guidance_embeds=True)
    spec = flaxdiff.FluxTransformer2DModel.from_config(dict(peer.config))
    state = as_original(spec, peer.state_dict())
    state["img_in.weight"] = torch.nn.functional.pad(state["img_in.weight"], (0, 16))
    file, scale = {}, 0.7
    draw = lambda *shape: torch.tensor(normal(*shape)) / 8
    for name, value in list(state.items()):
        module = name.rpartition(".")[0]
        if name.endswith("scale"):
            state[name] = file[name] = 1 + draw(*value.shape)
        elif name.endswith("bias"):
            file[f"{module}.lora_B.bias"] = draw(*value.shape)
            state[name] = value + scale * file[f"{module}.lora_B.bias"]
        else:
            down, up = draw(2, value.shape[1]), draw(len(value), 2)
            file |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            state[name] = value + scale * up @ down
    wide = diffusers.FluxTransformer2DModel(**SIZES | SEES | {"guidance_embeds": True})
    parts = {}
    for name, old in original.names(spec, wide.state_dict()).items():
        whole = state[original.whole(old)]
        rows = original.rows(old, len(whole))
        parts[name] = whole if rows is None else whole[rows]
    wide.load_state_dict(parts)
    safetensors.torch.save_file(file, tmp_path / "control.safetensors")

    pipe, params = flaxdiff.FluxControlPipeline.from_pretrained(folder())
    pipe, params = flaxdiff.load_control_lora(pipe, params, tmp_path / "control.safetensors", scale=scale)
    pipe.prepare_inputs(**SMALL, **CONTROL)  # it takes the picture now
    assert far(pipe.transformer, params["transformer"], wide, 32) < 1e-4
    with pytest.raises(ValueError, match="The transformer has a LoRA on"):
        flaxdiff.load_control_lora(pipe, params, tmp_path / "control.safetensors")


# --- pictures as prompts ---------------------------------------------------------------------------------------------


def siglip(**options):
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=16)
    config = transformers.SiglipVisionConfig(**sizes | dict(image_size=32) | options)
    return peers.lively(transformers.SiglipVisionModel(config))


def redux():
    """Flux Redux, which knows texts as well."""
    text = {name: part for name, part in parts().items() if name.startswith(("text", "tok"))}
    processor = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return diffusers.FluxPriorReduxPipeline(siglip(), processor, peers.lively(ReduxImageEncoder(16, 24)), **text)


def test_siglip_of_before(tmp_path):
    """Published files have the names of before transformers 5.6."""
    peer = siglip()
    peer.save_pretrained(tmp_path)
    state = {f"vision_model.{name}": value for name, value in peer.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    spec, params = flaxdiff.SiglipVisionModel.from_pretrained(tmp_path)
    pixels = normal(2, 32, 32, 3)
    with torch.no_grad():
        theirs = peer(peers.nchw(pixels)).last_hidden_state
    assert peers.relative(flaxdiff.apply(spec, params, pixels).last_hidden_state, theirs, of="SiglipVisionModel") < 1e-4


def test_a_strength_for_each_image():
    """What the network is told of guidance counts images, not prompts."""
    pipe, _, _ = load("FluxPipeline")
    told = pipe.prepare_inputs(prompt="a", num_images_per_prompt=2, guidance_scale=[3.5, 5.0])
    assert told["timestep_cond"].tolist() == [3.5, 5.0] and len(told["index"]) == 2
    told = pipe.prepare_inputs(prompt=["a", "b"], num_images_per_prompt=2, guidance_scale=[1, 2, 3, 4])
    assert told["timestep_cond"].tolist() == [1, 2, 3, 4]


def test_redux(tmp_path):
    """Two pictures and a text each; what it gives is what Flux takes, and PyTorch reads what is saved."""
    peer = redux()
    pipe, params = flaxdiff.DiffusionPipeline.from_pretrained(peers.saved(redux))
    images = [Image.fromarray(np.uint8(255 * image[0])) for image in (IMAGE, OTHER)]
    options = dict(prompt=["a red dog", "cat"], prompt_embeds_scale=[0.7, 0.4], pooled_prompt_embeds_scale=[1.0, 0.5])
    ours = pipe(params, image=images, **options)
    with torch.no_grad():
        theirs = peer(images, **options)
    for key in ours:
        assert peers.relative(ours[key], theirs[key], of="FluxPriorReduxPipeline") < 1e-3
    patches = normal(2, 4, 16)
    with torch.no_grad():
        theirs = peer.image_embedder(torch.tensor(patches)).image_embeds
    tokens = flaxdiff.apply(pipe.image_embedder, params["image_embedder"], patches)
    assert peers.relative(tokens, theirs, of="ReduxImageEncoder") < 1e-5
    base, _, _ = load("FluxPipeline")
    assert base.prepare_inputs(**ours)["prompt_embeds"].shape == (1, 516, 24)
    flaxdiff.save(tmp_path / "saved", pipe, params)
    with torch.no_grad():
        again = diffusers.FluxPriorReduxPipeline.from_pretrained(tmp_path / "saved")(images, **options)
    assert peers.relative(ours.prompt_embeds, again.prompt_embeds) < 1e-3
    with pytest.raises(TypeError, match="FluxPriorReduxPipeline has no loop"):
        pipe.generate(params, KEY, {})
    with pytest.raises(ValueError, match="prompt_embeds_scale has 3 entries for 2 pictures"):
        pipe(params, image=images, prompt_embeds_scale=[1.0, 2.0, 3.0])
