"""Stable Diffusion 3 against PyTorch: its transformer and ControlNets, and every pipeline of it."""

import copy
import functools
import json
import sys

import diffusers
import jax
import numpy as np
import peers
import peft
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from test_single_file import as_original

import flaxdiff
from flaxdiff.nn.stack import Runs
from flaxdiff.pipelines.tasks import blank_inputs
from flaxdiff.planning import plan

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
SIZES = dict(sample_size=8, num_attention_heads=2, attention_head_dim=12, caption_projection_dim=24)
SIZES |= dict(joint_attention_dim=56, pooled_projection_dim=48, pos_embed_max_size=12)
NEWER = dict(dual_attention_layers=(0, 1), qk_norm="rms_norm")  # what 3.5 has
KEY = jax.random.key(0)


@functools.cache
def transformer(**options):
    torch.manual_seed(0)
    return peers.lively(diffusers.SD3Transformer2DModel(**SIZES | {"num_layers": 4} | options))


@functools.cache
def controlnet(seed=0, **options):
    torch.manual_seed(seed)
    return peers.lively(diffusers.SD3ControlNetModel(**SIZES | {"num_layers": 2} | options))


# --- the networks ----------------------------------------------------------------------------------------------------

HINDERED = {"skip": (np.float32([[0, 1, 0, 1], [0, 1, 0, 1]]),)}
CASES = {
    "3": ({}, True, {}, {}),
    "3.5": (NEWER | {"num_layers": 5}, True, {}, {}),
    "in a loop": (NEWER | {"num_layers": 5}, False, {}, {}),
    "without some": ({}, True, {"skip_layers": [1, 3]}, {"perturb": HINDERED}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformer(case, tmp_path):
    """Places of a part of the table, with what ControlNets add; and all times at once are each of them."""
    net, scan, there, here = CASES[case]
    peer = transformer(**net)
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.SD3Transformer2DModel.from_pretrained(tmp_path, scan_layers=scan)
    x, text, pooled, t = normal(2, 6, 12, 16), normal(2, 7, 56), normal(2, 48), np.float32([30, 901])
    if not here:
        added = normal(3, 2, 18, 24)
        here, there = (
            {"block_controlnet_hidden_states": added},
            {"block_controlnet_hidden_states": [*map(torch.tensor, added)]},
        )
    with torch.no_grad():
        theirs = peer(peers.nchw(x), *map(torch.tensor, (text, pooled, t)), **there).sample
    run = jax.jit(lambda params, pooled, t: flaxdiff.apply(spec, params, x, text, pooled, t, **here))
    assert peers.relative(run(params, pooled, t), peers.nhwc(theirs), of="SD3Transformer2DModel") < 1e-4
    if case == "3":
        told = flaxdiff.apply(spec, params, np.float32([[100], [700]]), pooled, method="times")
        assert peers.relative(run(params, None, jax.tree.map(lambda a: a[1], told)), run(params, pooled, 700.0)) < 1e-5
        flaxdiff.checkpoint.save_model(tmp_path / "ours", spec, params)
        again = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "ours").state_dict()
        assert all(torch.equal(value, again[name]) for name, value in peer.state_dict().items())


def test_runs():
    """Equal neighbours are stacked under the numbers of the blocks, and others are by themselves."""
    spec = flaxdiff.SD3Transformer2DModel.from_config(SIZES | NEWER | {"num_layers": 6})
    blocks = spec.module(spec.config).transformer_blocks
    assert isinstance(blocks, Runs) and blocks.names == (("0-1",), ("2-4",), ("5",))
    with pytest.raises(ValueError, match="14 x 4 patches are more than the 12 x 12 places"):
        jax.eval_shape(
            lambda p: flaxdiff.apply(spec, p, np.zeros((1, 28, 8, 16)), np.zeros((1, 5, 56)), np.zeros((1, 48)), 1.0),
            flaxdiff.abstract(spec),
        )


NETS = {
    "3": dict(extra_conditioning_channels=1),
    "two kinds of blocks": NEWER | dict(dual_attention_layers=(0,), pos_embed_type=None),
    "without a text": dict(joint_attention_dim=None, use_pos_embed=False),
}


@pytest.mark.parametrize(("case", "scan"), [("3", True), ("two kinds of blocks", True), ("without a text", False)])
def test_controlnet(case, scan, tmp_path):
    peer = controlnet(**NETS[case])
    peer.save_pretrained(tmp_path)
    spec, params = flaxdiff.SD3ControlNetModel.from_pretrained(tmp_path, scan_layers=scan)
    seen = normal(2, 6, 12, 16 + spec.config.extra_conditioning_channels)
    x = normal(2, 6, 12, 16) if spec.config.use_pos_embed else normal(2, 18, 24)
    text = None if case == "without a text" else normal(2, 7, 56)
    pooled, t = normal(2, 48), np.float32([30, 901])
    with torch.no_grad():
        there = peers.nchw(x) if x.ndim == 4 else torch.tensor(x)
        told = None if text is None else torch.tensor(text)
        theirs = peer(
            there, peers.nchw(seen), 0.7, told, torch.tensor(pooled), torch.tensor(t)
        ).controlnet_block_samples
    ours = flaxdiff.apply(spec, params, x, seen, text, pooled, t, 0.7)
    assert peers.relative(ours, torch.stack(theirs), of="SD3ControlNetModel") < 1e-4


# --- the pipelines ---------------------------------------------------------------------------------------------------


@functools.cache
def parts(newer=False, t5=True, shift=0.1):
    """The components of a pipeline."""
    vae = peers.vae(
        latent_channels=16, shift_factor=shift, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False
    )
    encoder = lambda seed: peers.lively(peers.text_encoder(projected=True, seed=seed))
    return dict(
        transformer=transformer(**NEWER if newer else {}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **{"use_dynamic_shifting": True} if newer else {"shift": 3.0}
        ),
        vae=peers.sure(vae),
        text_encoder=encoder(0),
        tokenizer=peers.tokenizer(),
        text_encoder_2=encoder(1),
        tokenizer_2=peers.tokenizer("!"),
        text_encoder_3=peers.t5_encoder(width=56) if t5 else None,
        tokenizer_3=peers.t5_tokenizer() if t5 else None,
    )


@functools.cache
def folder(**options) -> str:
    """Where a pipeline of these parts was saved."""
    return peers.saved(functools.partial(diffusers.StableDiffusion3Pipeline, **parts(**options)))


def load(name, nets=(), **options):
    """Our pipeline and PyTorch's, of the same components and perhaps ControlNets."""
    there = {"controlnet": nets[0] if len(nets) == 1 else [*nets]} if nets else {}
    here = {"controlnet": [flaxdiff.SD3ControlNetModel.from_pretrained(saved(net)) for net in nets]} if nets else {}
    pipe, params = getattr(flaxdiff, name).from_pretrained(folder(**options), **here)
    peer = getattr(diffusers, name)(**parts(**options), **there)
    peer.set_progress_bar_config(disable=True)
    return pipe.replace(progress=False), params, peer


@functools.cache
def saved(net) -> str:
    return peers.saved(lambda: net)


SMALL = dict(prompt="a red dog", max_sequence_length=12, num_inference_steps=3, height=16, width=24)
NOISE = normal(1, 8, 12, 16)
IMAGE = rng.uniform(size=(1, 16, 24, 3)).astype(np.float32)
MASK = np.zeros((1, 16, 24, 1), np.float32)
MASK[:, 4:12, 6:18] = 1


def agree(name, options, monkeypatch, **how):
    """What a pipeline makes is what PyTorch's does."""
    pipe, params, peer = load(name, **how)
    options = SMALL | options
    monkeypatch.setattr(
        sys.modules[getattr(diffusers, name).__module__], "randn_tensor", lambda *a, **k: peers.nchw(NOISE)
    )
    ours = pipe(params, KEY, **options, latents=NOISE, output_type="np").images
    there = {k: _there(k, v) for k, v in options.items()}
    with torch.no_grad():
        theirs = peer(**there, output_type="np").images
    assert peers.relative(ours, theirs, of=name) < 1e-3


def _there(name, value):
    """An option as PyTorch takes it, where tensors of pictures to follow are in [-1, 1]."""
    if name == "control_image":
        return [peers.nchw(2 * v - 1) for v in value] if isinstance(value, list) else peers.nchw(2 * value - 1)
    return peers.nchw(value) if isinstance(value, np.ndarray) else value


NEGATIVES = dict(negative_prompt="ugly", negative_prompt_2="bad", negative_prompt_3="b")
TEXTS = {
    "of every encoder": (dict(prompt_2="cat", prompt_3="red", clip_skip=1, **NEGATIVES), {}),
    "not guided, without T5, shifted": (dict(guidance_scale=1.0, mu=0.8), dict(newer=True, t5=False)),
    "3.5, and blocks are skipped": (
        dict(skip_guidance_layers=[1, 2], skip_layer_guidance_stop=0.5, skip_layer_guidance_scale=1.5),
        dict(newer=True),
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_to_image(case, monkeypatch):
    options, how = TEXTS[case]
    agree("StableDiffusion3Pipeline", options, monkeypatch, **how)


TASKS = {
    "two of three": ("StableDiffusion3Img2ImgPipeline", dict(image=IMAGE, strength=0.6), {}),
    "inpaint": ("StableDiffusion3InpaintPipeline", dict(image=IMAGE, mask_image=MASK, strength=0.7), dict(shift=0.0)),
    "all": ("StableDiffusion3InpaintPipeline", dict(image=IMAGE, mask_image=MASK, strength=1.0), dict(shift=0.0)),
    "perturbed": ("StableDiffusion3PAGPipeline", dict(pag_scale=2.0), {}),
    "perturbed, not guided": (
        "StableDiffusion3PAGImg2ImgPipeline",
        dict(image=IMAGE, strength=0.6, pag_scale=2.0, guidance_scale=1.0),
        {},
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_tasks(case, monkeypatch):
    name, options, how = TASKS[case]
    agree(name, options, monkeypatch, **how)


LED = {
    "two, one of them after the first step": (
        [{}, {"seed": 1}],
        dict(control_guidance_start=[0.0, 0.3], controlnet_conditioning_scale=[0.7, 0.4]),
    ),
    "without a text, up to the second step": (
        [NETS["without a text"] | dict(force_zeros_for_pooled_projection=False)],
        dict(control_guidance_end=0.7),
    ),
}


@pytest.mark.parametrize("case", LED)
def test_led(case, monkeypatch):
    nets, options = LED[case]
    seen = [IMAGE, 1 - IMAGE][: len(nets)]
    options = dict(control_image=seen if len(nets) > 1 else IMAGE, **options)
    agree("StableDiffusion3ControlNetPipeline", options, monkeypatch, nets=[controlnet(**net) for net in nets])


def test_led_in_painting(monkeypatch):
    options = dict(control_image=IMAGE, control_mask=MASK)
    name = "StableDiffusion3ControlNetInpaintingPipeline"
    agree(name, options, monkeypatch, nets=[controlnet(extra_conditioning_channels=1)])


def test_there_and_back(tmp_path):
    """PyTorch's diffusers loads what is saved, with and without T5."""
    pipe, params = flaxdiff.load(folder())
    flaxdiff.save(tmp_path / "whole", pipe, params)
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole")
    theirs = parts()["transformer"].state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in again.transformer.state_dict().items())
    less, mine = flaxdiff.load(folder(), text_encoder_3=None, tokenizer_3=None)
    assert "text_encoder_3" not in mine and len(less.tokenizers) == 2


def test_tiny_autoencoder(tmp_path):
    """TAESD3 takes the place of the large one: latents of 16 channels, neither scaled nor shifted."""
    options = dict(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, shift_factor=0.0)
    peer = peers.lively(diffusers.AutoencoderTiny(latent_channels=16, **options))
    peer.save_pretrained(tmp_path)
    spec, of_vae = flaxdiff.AutoencoderTiny.from_pretrained(tmp_path)
    pipe = flaxdiff.load(folder())[0].replace(vae=spec)
    with torch.no_grad():
        theirs = peer.decode(peers.nchw(NOISE)).sample
    ours = pipe.family.decode(pipe.program.networks({"vae": of_vae}), NOISE)
    assert peers.relative(ours, peers.nhwc(theirs)) < 1e-4


def test_lora(tmp_path):
    """What PEFT trains in every run of blocks, as diffusers saves it; and back again."""
    plain, peer = (copy.deepcopy(transformer(**NEWER)) for _ in range(2))
    targets = ["to_q", "add_k_proj", "to_add_out", "to_out.0", "ff.net.2", "norm1.linear", "proj_out", "linear_1"]
    peer.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    layers = {k: v.contiguous() for k, v in peft.utils.get_peft_model_state_dict(peer).items()}
    config = peer.peft_config["default"].to_dict()
    save = functools.partial(diffusers.StableDiffusion3Pipeline.save_lora_weights, transformer_lora_layers=layers)
    save(tmp_path / "theirs", transformer_lora_adapter_metadata=config)
    pipe, params = flaxdiff.load(folder(newer=True))
    params = pipe.load_lora_weights(params, tmp_path / "theirs")
    flaxdiff.save_lora(tmp_path / "ours", pipe, flaxdiff.adapter_of(params))
    again = diffusers.StableDiffusion3Pipeline(**parts(newer=True) | {"transformer": plain})
    again.load_lora_weights(tmp_path / "ours")
    told = normal(1, 6, 12, 16), normal(1, 7, 56), normal(1, 48), np.float32([300])
    with torch.no_grad():
        there = peers.nchw(told[0]), *map(torch.tensor, told[1:])
        before, theirs, read = (peers.nhwc(net(*there).sample) for net in (transformer(**NEWER), peer, plain))
    ours = flaxdiff.apply(pipe.transformer, params["transformer"], *told)
    assert peers.relative(ours, theirs) < 1e-4 and peers.relative(read, theirs) < 1e-4 < peers.relative(before, theirs)


@functools.cache
def single() -> dict:
    """What a single file of the newer kind holds."""
    pipe, _ = flaxdiff.load(folder(newer=True))
    state = lambda name: parts(newer=True)[name].state_dict()
    of = lambda prefix, tensors: {prefix + k: v.clone().contiguous() for k, v in tensors.items()}
    # what projects by convolutions in the attention of an autoencoder there
    square = lambda k, v: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v
    vae = {k: square(k, v) for k, v in as_original(pipe.vae, state("vae")).items()}
    made = of("model.diffusion_model.", as_original(pipe.transformer, state("transformer")))
    made |= of("first_stage_model.", vae) | of("text_encoders.t5xxl.transformer.", state("text_encoder_3"))
    for name, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        made |= of(f"text_encoders.{name}.transformer.", state(component))
        made[f"text_encoders.{name}.logit_scale"] = torch.ones(())
    return made


def test_single_file(tmp_path):
    """All parameters of the folder; the names are those that diffusers' own conversion expects."""
    tensors = single()
    state = transformer(**NEWER).state_dict()
    back = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    )
    assert back.keys() == state.keys() and all(torch.equal(value, back[name]) for name, value in state.items())
    save_file(tensors, tmp_path / "sd3.safetensors")
    wanted, params = flaxdiff.load(folder(newer=True))
    pipe, found = flaxdiff.StableDiffusion3Pipeline.from_single_file(
        tmp_path / "sd3.safetensors", config=folder(newer=True)
    )
    assert dict(pipe.specs) == dict(wanted.specs) and dict(pipe.tokenizers) == dict(wanted.tokenizers)
    assert pipe.scheduler == wanted.scheduler and jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    less, found = flaxdiff.DiffusionPipeline.from_single_file(
        tmp_path / "sd3.safetensors", config=folder(newer=True), text_encoder_3=None
    )
    assert type(less) is type(pipe) and "text_encoder_3" not in found and len(less.tokenizers) == 2


def test_lora_of_kohya(tmp_path):
    """Its names are the original ones, queries, keys and values in one: what the file with the updates added holds."""
    prefix = "model.diffusion_model."
    bare = {k.removeprefix(prefix): v for k, v in single().items() if k.startswith(prefix)}
    file, merged, draw = {}, dict(bare), torch.Generator().manual_seed(1)
    for name, weight in bare.items():
        if name.endswith(".weight") and weight.ndim in (2, 4) and not name.startswith("pos_embed"):
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            down = torch.randn(2, *weight.shape[1:], generator=draw) / 8
            up = torch.randn(len(weight), 2, *(1,) * (weight.ndim - 2), generator=draw) / 8
            file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(3.0)}
            merged[name] = weight + 1.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    save_file(file, tmp_path / "kohya.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    pipe, params = flaxdiff.load(folder(newer=True))
    params = flaxdiff.fuse_lora(flaxdiff.load_lora(pipe, params, tmp_path / "kohya.safetensors"))["transformer"]
    _, wanted = flaxdiff.SD3Transformer2DModel.from_single_file(tmp_path / "merged.safetensors", sample_size=8)
    for name in wanted:
        np.testing.assert_allclose(params[name], wanted[name], atol=1e-5, err_msg=name)
    assert sum("qkv" in name for name in file) > 10


def test_several_controlnets_in_a_folder(tmp_path):
    """Under the class that diffusers has for them; PyTorch cannot save them, and knows no folder of several."""
    pipe, params, _ = load("StableDiffusion3ControlNetPipeline", [controlnet(), controlnet(seed=1)])
    flaxdiff.save(tmp_path, pipe, params)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["controlnet"] == ["diffusers", "SD3MultiControlNetModel"] and "controlnet_1" not in index
    again, found = flaxdiff.load(tmp_path)
    assert type(again) is type(pipe) and dict(again.specs) == dict(pipe.specs)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_what_follows_from_a_single_file(tmp_path):
    """All that names and shapes can say, of a transformer alone and of the others."""
    tensors = single()
    bare = {k.removeprefix("model.diffusion_model."): v for k, v in tensors.items() if k.startswith("model.diff")}
    save_file(bare, tmp_path / "bare.safetensors")
    save_file(tensors, tmp_path / "whole.safetensors")
    wanted, params = flaxdiff.load(folder(newer=True))
    spec, found = flaxdiff.SD3Transformer2DModel.from_single_file(tmp_path / "bare.safetensors", sample_size=8)
    assert spec == wanted.transformer
    jax.tree.map(np.testing.assert_array_equal, found, params["transformer"])
    spec, _ = flaxdiff.T5EncoderModel.from_single_file(tmp_path / "whole.safetensors")
    assert spec == wanted.text_encoder_3
    spec, _ = flaxdiff.AutoencoderKL.from_single_file(tmp_path / "whole.safetensors", norm_num_groups=8)
    assert (spec.config.scaling_factor, spec.config.shift_factor) == (1.5305, 0.0609)
    known = {k: leaf.shape for k, leaf in flaxdiff.layout(wanted.vae).items()}
    assert known == {k: leaf.shape for k, leaf in flaxdiff.layout(spec).items()}


@pytest.mark.parametrize("name", ["sd3-medium", "sd35-medium", "sd35-large", "pixart-sigma", "dit-512"])
def test_published_pipelines(name):
    """At full size, by shapes alone, what the planner compiles."""
    pipe = plan.pipeline(name)
    shapes = {component: flaxdiff.abstract(spec, jax.numpy.bfloat16) for component, spec in pipe.specs}
    images = jax.eval_shape(pipe.generate, shapes, KEY, blank_inputs(pipe, batch=2))
    side = 512 if name == "dit-512" else 1024
    assert images.shape == (2, side, side, 3)


def test_blank_inputs_of_painting_by_controlnets():
    pipe, *_ = load("StableDiffusion3ControlNetInpaintingPipeline", [controlnet(extra_conditioning_channels=1)])
    assert blank_inputs(pipe, height=16, width=24)["control_mask"].shape == (1, 16, 24, 1)


def test_bad_input():
    pipe, _ = flaxdiff.load(folder())
    with pytest.raises(ValueError, match="max_sequence_length=600: T5 reads between 1 and 512"):
        pipe.prepare_inputs(prompt="a", max_sequence_length=600)
    with pytest.raises(ValueError, match="height=18, width=24: .* multiples of 4; the nearest are 16 and 24"):
        pipe.prepare_inputs(**SMALL | {"height": 18})
    with pytest.raises(ValueError, match="prompt_embeds and pooled_prompt_embeds go together"):
        pipe.prepare_inputs(prompt_embeds=normal(1, 5, 56))
    flags = pipe.prepare_inputs(**SMALL, skip_guidance_layers=2)["guidance"]["skip_guidance_layers"]
    assert flags[0].tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match=r"No layer of SD3Transformer2DModel has .*9.* in its name"):
        pipe.prepare_inputs(**SMALL, skip_guidance_layers=[9])
    blur = lambda guidance_scale=7.0, layers=flaxdiff.guidance.Layers(["1"]): flaxdiff.guidance.seg(1.0, layers)
    other = pipe.replace(guidance=blur)
    inputs = other.prepare_inputs(**SMALL)
    shapes = {name: flaxdiff.abstract(spec) for name, spec in other.specs}
    with pytest.raises(ValueError, match="knows no hindrance of its blocks by .'blur'"):
        jax.eval_shape(other.generate, shapes, KEY, inputs)
