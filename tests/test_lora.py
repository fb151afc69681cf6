"""LoRA and its kin: every format finds its place, what is put on computes what PyTorch's diffusers and PEFT compute."""

import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors.numpy import save_file
from test_pipelines import KEY, compare, load

import flaxdiff
from flaxdiff import published, weights
from flaxdiff.adapters import formats, lora
from flaxdiff.checkpoint import convert, original, safetensors
from flaxdiff.weights import LoRA

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
OPTIONS = dict(prompt=["a red dog"], negative_prompt=["ugly"], num_inference_steps=2, guidance_scale=4.0)
TARGETS = r"to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.[02](\.proj)?|[qkv]_proj|out_proj|fc[12]"
LOCON = TARGETS + r"|conv[12]|conv|conv_shortcut|time_emb_proj|conv_in|conv_out"


def modules(specs, targets=TARGETS):
    """(component, module, shape in a file) of what a LoRA updates."""
    for component, spec in specs.items():
        for name, leaf in flaxdiff.layout(spec).items():
            for own in convert.names_in_file(name, leaf):
                module = own.removesuffix(".weight")
                if leaf.kind in ("linear", "conv") and re.search(rf"\.({targets})$", f".{module}"):
                    yield component, module, convert.shape_in_file(leaf)


def pair(shape, rank, scale=0.3):
    """Random factors as PyTorch keeps them: down [rank, in, kh, kw], up [out, rank, 1, 1]."""
    return scale * normal(rank, *shape[1:]), scale * normal(shape[0], rank, *(1,) * (len(shape) - 2))


def write(folder, arrays):
    path = folder / "lora.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
    return path


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def kohya(component, module, several=False):
    prefix = "lora_te1_" if several and component == "text_encoder" else KOHYA[component]
    return prefix + module.replace(".", "_")


def specs_of(name):
    """component -> spec, at full size."""
    _, components, _ = published.MODELS[name]
    described = {component: published.COMPONENTS[full] for component, full in components.items()}
    return {component: getattr(flaxdiff, cls).from_config(config) for component, (cls, config) in described.items()}


# --- formats ------------------------------------------------------------------------------------------------------------


def older(component, module):
    """Names of diffusers before PEFT."""
    module = re.sub(r"\.to_out\.0$", ".to_out", re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", module))
    processed = re.sub(r"(attn[12])\.(to_\w+)$", r"\1.processor.\2_lora", module)
    if processed != module or "self_attn" in module:
        return f"{component}.{processed}" + ("_lora" if processed == module else "")
    return f"{component}.{module}." + ("lora_linear_layer" if component != "unet" else "lora")


FORMATS = {
    "diffusers": lambda c, m: (f"{c}.{m}.lora_A.weight", f"{c}.{m}.lora_B.weight"),
    "older": lambda c, m: (f"{older(c, m)}.down.weight", f"{older(c, m)}.up.weight"),
    "kohya": lambda c, m: (f"{kohya(c, m)}.lora_down.weight", f"{kohya(c, m)}.lora_up.weight"),
    "kohya for two encoders": lambda c, m: (f"{kohya(c, m, True)}.lora_down.weight", f"{kohya(c, m, True)}.lora_up.weight"),
}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_key_at_full_size(form, name):
    specs = {c: s for c, s in specs_of(name).items() if c != "vae"}
    known, listed = lora.places(specs), list(modules(specs, TARGETS if form == "older" else LOCON))
    assert len(listed) > 250
    for component, module, _ in listed:
        for key in FORMATS[form](component, module):
            found, unknown = formats.modules({key: None})
            place = known[next(iter(found))]
            assert not unknown and (place.component, place.module) == (component, module), key


def test_every_key_of_the_original_unet_at_full_size():
    """Kohya's SDXL files name the blocks of SGM; diffusers' own conversion says where they belong."""
    specs = specs_of("sdxl")
    known, spec = lora.places(specs), specs["unet"]
    listed = [module for component, module, _ in modules(specs) if component == "unet"]
    old = original.names(spec, [f"{module}.weight" for module in listed])
    keys = {"lora_unet_" + n.removesuffix(".weight").replace(".", "_") + ".lora_down.weight": m for m, n in old.items()}
    theirs = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(dict(keys), spec.config)
    assert len(theirs) == len(listed) > 700
    for key, weight in theirs.items():
        key = key.replace("input_b", "down_b").replace("middle_b", "mid_b").replace("output_b", "up_b")
        assert key.removesuffix(".lora_down.weight") == kohya("unet", weight.removesuffix(".weight"))
    for key, weight in keys.items():
        ((found, _),) = formats.modules({key: None})[0].items()
        assert known[found].module + ".weight" == weight


# --- against PyTorch ----------------------------------------------------------------------------------------------------


def tiny(build):
    """A tiny pipeline, here and there; here with the encoders and the U-Net that a LoRA may update."""
    pipe, params, peer = load(build)
    return pipe, params, peer, {name: spec for name, spec in pipe.specs if name != "vae"}


def same(pipe, params, peer, **more):
    return compare(pipe, params, peer, OPTIONS, latents=LATENTS, **more)


LATENTS = normal(1, 8, 8, 4)
UNET = r"to_[qkv]|to_out\.0|proj_in|ff\.net\.2"


def test_diffusers_file_and_weights(tmp_path):
    """Loaded there and here: whole, at half, by block, beside another, merged in and taken off."""
    pipe, params, peer, specs = tiny(peers.stable_diffusion_xl)
    paths = []
    for i, rank in enumerate((2, 3)):
        arrays = {}
        for component, module, shape in modules({"unet": specs["unet"]}, UNET):
            for key, array in zip(FORMATS["diffusers"](component, module), pair(shape, rank)):
                arrays[key] = array
        (tmp_path / str(i)).mkdir()
        paths.append(write(tmp_path / str(i), arrays))
        peer.load_lora_weights(str(paths[i]), adapter_name=f"a{i}")
    one, two = (flaxdiff.read_lora(pipe, path) for path in paths)
    plain = pipe(params, KEY, **OPTIONS, latents=LATENTS, output_type="np").images
    for names, scales in (
        (["a0"], [1.0]),
        (["a1"], [0.5]),
        (["a0", "a1"], [0.7, -0.4]),
        (["a0", "a1"], [{"down": 0.1, "up": {"block_0": [0.3, 0.9]}}, {"mid": 0.2}]),
    ):
        peer.set_adapters(names, [{"unet": s} if isinstance(s, dict) else s for s in scales])
        adapters = [{"a0": one, "a1": two}[name] for name in names]
        adapted = flaxdiff.set_adapters(params, adapters, scales)
        assert same(pipe, adapted, peer) < 1e-3
    assert np.abs(pipe(adapted, KEY, **OPTIONS, latents=LATENTS, output_type="np").images - plain).max() > 1e-3
    fused = flaxdiff.fuse_lora(adapted)
    assert not flaxdiff.adapter_of(fused) and same(pipe, fused, peer) < 1e-3
    back = flaxdiff.unfuse_lora(fused, flaxdiff.adapter_of(adapted))
    for name, weight in params["unet"].items():
        np.testing.assert_allclose(back["unet"][name], weight, atol=1e-5)
        assert flaxdiff.unload_lora(adapted)["unet"][name] is weight
