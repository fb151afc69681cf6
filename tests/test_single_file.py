"""Single files with the original names: configuration and parameters are those of the folder in diffusers' layout."""

import dataclasses

import diffusers
import jax
import numpy as np
import peers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file

import flaxdiff
from flaxdiff import published, registry
from flaxdiff.checkpoint import kinds, original, single_file

BUILDS = {
    "sd1": (peers.stable_diffusion_1, "cond_stage_model.transformer.", None),
    "sd2": (peers.stable_diffusion_2, "cond_stage_model.model.", None),
    "xl": (peers.stable_diffusion_xl, "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    "refiner": (peers.stable_diffusion_xl_refiner, None, "conditioner.embedders.0.model."),
}


def as_original(spec, state):
    """A state dict with today's names as the original code wrote it; what is one tensor there is joined."""
    if spec.module.library == "transformers":  # version 5 leaves out of some what every file has
        state = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items()}
    made, parted = {}, {}
    for name, old in original.names(spec, state).items():
        if old.endswith(".T"):
            made[old[:-2]] = state[name].T.contiguous()
        elif old.endswith(".swapped"):
            made[original.whole(old)] = torch.cat(state[name].chunk(2)[::-1])
        elif old.endswith("]"):
            parted.setdefault(original.whole(old), {})[old] = state[name]
        else:
            made[old] = state[name]
    return made | {old: torch.cat([parts[i] for i in sorted(parts)]) for old, parts in parted.items()}


def single(kind, extra=True):
    """What a single file of a tiny pipeline holds, and the pipeline's builder."""
    build, first, second = BUILDS[kind]
    peer, pipe = build(), flaxdiff.load(peers.saved(build))[0]
    tensors = {}
    for prefix, name in (("model.diffusion_model.", "unet"), ("first_stage_model.", "vae")):
        own = as_original(dict(pipe.specs)[name], getattr(peer, name).state_dict())
        if name == "vae":  # its attention projects by convolutions there
            own = {k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in own.items()}
        tensors |= {prefix + k: v for k, v in own.items()}
    for prefix, name in ((first, "text_encoder"), (second, "text_encoder_2")):
        if prefix is None:
            continue
        state = getattr(peer, name).state_dict()
        if prefix.endswith("transformer."):
            own = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()}
            own["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        else:
            own = as_original(dict(pipe.specs)[name], state) | {"logit_scale": torch.ones(())}
            if kind == "sd2":
                layer = {k: v for k, v in own.items() if ".resblocks.2." in k}
                own |= {k.replace(".2.", ".3.", 1): v for k, v in layer.items()}  # the one that is not read
                own["text_projection"] = torch.ones(16, 16)
        tensors |= {prefix + k: v for k, v in own.items()}
    return build, {k: v.clone().contiguous() for k, v in tensors.items()}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_pipeline(kind, ending, tmp_path):
    """Every parameter, specs, scheduler and settings: those of the folder."""
    build, tensors = single(kind)
    path = tmp_path / f"it.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 3, "epoch": 1}, path)
    else:
        save_file(tensors, path)
    wanted, params = flaxdiff.load(peers.saved(build))
    pipe, found = flaxdiff.DiffusionPipeline.from_single_file(path, config=peers.saved(build))
    assert type(pipe) is type(wanted) and dict(pipe.specs) == dict(wanted.specs)
    assert (pipe.scheduler, pipe.tokenizers, dict(pipe.settings)) == (
        wanted.scheduler,
        wanted.tokenizers,
        dict(wanted.settings),
    )
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    if ending == "safetensors" and "refiner" not in kind and type(wanted).__name__ in registry.COUNTERPARTS[0].values():
        pipe, _ = flaxdiff.AutoPipelineForInpainting.from_single_file(path, config=peers.saved(build))
        assert type(pipe) is flaxdiff.StableDiffusionInpaintPipeline


@pytest.mark.parametrize("kind", BUILDS)
def test_the_configuration_follows_from_the_file(kind, tmp_path):
    """All that names and shapes can say; heads and groups of so small a network are the test's own."""
    build, tensors = single(kind)
    save_file(tensors, tmp_path / "it.safetensors")
    wanted = flaxdiff.load(peers.saved(build))[0]
    parts, kind = single_file.open_file(tmp_path / "it.safetensors")
    for name, spec in wanted.specs:
        own = {"unet": {"norm_num_groups": 8, "attention_head_dim": 2}, "vae": {"norm_num_groups": 8}}.get(name, {})
        found = single_file.spec_of(parts[name], kind, None, own)
        layout = {k: leaf.shape for k, leaf in flaxdiff.layout(found).items()}
        assert layout == {k: leaf.shape for k, leaf in flaxdiff.layout(spec).items()}, name
    assert kind.pipeline == type(wanted).__name__


PARTS = {
    "sd15": {"unet": "SD 1.5 UNet", "vae": "SD VAE"},
    "sd15 inpainting": {"unet": "SD 1.5 inpainting UNet"},
    "sd21": {"unet": "SD 2.1 UNet", "text_encoder": "SD 2.1 text encoder"},
    "sdxl": {"unet": "SDXL base UNet", "vae": "SDXL VAE", "text_encoder_2": "SDXL text encoder 2"},
    "sdxl-refiner": {"unet": "SDXL refiner UNet"},
    "sd3": {"transformer": "SD3 medium transformer", "vae": "SD3 VAE"},
    "sd35": {"transformer": "SD 3.5 medium transformer"},
}
KIND = {"sd15": 0, "sd21": 1, "sdxl": 2, "sdxl-refiner": 3, "sd3": 4, "sd35": 4}


@pytest.mark.parametrize("name", PARTS)
def test_full_size(name):
    """By shapes: diffusers' converter finds in our names what its classes hold, and we infer the published settings."""
    kind = single_file.KINDS[KIND[name.partition(" ")[0]]]
    for component, full in PARTS[name].items():
        class_name, settings = published.COMPONENTS[full]
        spec = getattr(flaxdiff, class_name).from_config(settings)
        with torch.device("meta"):
            if class_name.startswith("CLIP"):
                config = transformers.CLIPTextConfig(**settings)
                model = getattr(transformers, class_name)(config)
            else:
                model = getattr(diffusers, class_name)(**settings)
            state = model.state_dict()
            old = as_original(spec, state)
        back = converted(class_name, model, old)
        shapes = {k: tuple(v.shape) for k, v in state.items()}
        root = "text_model." if not any(k.startswith("text_model.") for k in state) else ""
        assert {k.removeprefix(root): tuple(v.shape) for k, v in back.items()} == shapes, component
        if full == "SD 2.1 text encoder":
            old |= {k.replace(".22.", ".23."): v for k, v in old.items() if ".22." in k}
        shapes = {k: tuple(v.shape) for k, v in old.items()}
        found = getattr(flaxdiff, class_name).from_config(kinds.CONFIGS[class_name](shapes, kind))
        ours, wanted = dataclasses.asdict(found.config), dataclasses.asdict(spec.config)
        skipped = {"sample_size", "bos_token_id", "eos_token_id", "projection_dim"}
        if name == "sdxl-refiner":
            skipped |= {"transformer_layers_per_block"}  # of stages without any
        assert {k: v for k, v in ours.items() if k not in skipped} == {
            k: v for k, v in wanted.items() if k not in skipped
        }
        assert {k: leaf.shape for k, leaf in flaxdiff.layout(found).items()} == {
            k: leaf.shape for k, leaf in flaxdiff.layout(spec).items()
        }


def converted(class_name, model, old):
    """diffusers' own conversion of the original names."""
    if class_name == "SD3Transformer2DModel":
        return theirs.convert_sd3_transformer_checkpoint_to_diffusers(dict(old))
    prefix = next(prefix for prefix, _, name in reversed(single_file.PREFIXES) if name == class_name)
    old = {prefix + k: v for k, v in old.items()}
    if class_name == "UNet2DConditionModel":
        return theirs.convert_ldm_unet_checkpoint(old, model.config)
    if class_name == "AutoencoderKL":
        return theirs.convert_ldm_vae_checkpoint(old, model.config)
    return theirs.convert_open_clip_checkpoint(model, old, prefix=prefix)


def test_networks_alone(tmp_path):
    """A bare autoencoder, and one out of a whole file, with a setting that no shape tells."""
    build, tensors = single("xl")
    save_file(tensors, tmp_path / "all.safetensors")
    bare = {k.removeprefix("first_stage_model."): v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    save_file(bare, tmp_path / "vae.safetensors")
    wanted, params = flaxdiff.load(peers.saved(build))
    options = dict(norm_num_groups=8, scaling_factor=0.5)
    for path in ("all.safetensors", "vae.safetensors"):
        spec, found = flaxdiff.AutoencoderKL.from_single_file(tmp_path / path, **options)
        assert spec.config.scaling_factor == 0.5 and spec.config.norm_num_groups == 8
        jax.tree.map(np.testing.assert_array_equal, found, params["vae"])
    config = wanted.unet.module.to_config(wanted.unet.config)
    spec, found = flaxdiff.UNet2DConditionModel.from_single_file(tmp_path / "all.safetensors", config=config)
    assert spec == wanted.unet
    jax.tree.map(np.testing.assert_array_equal, found, params["unet"])
    own = build().unet.state_dict()  # today's names in one file
    save_file(own, tmp_path / "unet.safetensors")
    again = flaxdiff.UNet2DConditionModel.from_single_file(tmp_path / "unet.safetensors", config=config)[1]
    jax.tree.map(np.testing.assert_array_equal, again, params["unet"])


def test_what_is_no_such_file(tmp_path):
    build, tensors = single("sd1")
    save_file(tensors, tmp_path / "sd.safetensors")
    save_file({"transformer.h.0.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({k: v for k, v in tensors.items() if k.startswith("first_stage")}, tmp_path / "vae.safetensors")
    broken = {k: v for k, v in tensors.items() if "input_blocks.1.0" not in k}
    save_file(broken, tmp_path / "broken.safetensors")
    odd = tensors | {"model.diffusion_model.more.weight": torch.ones(2)}
    save_file(odd, tmp_path / "odd.safetensors")
    save_file(
        tensors | {"model.diffusion_model.label_emb.weight": torch.ones(9, 64)}, tmp_path / "upscaler.safetensors"
    )
    folder = peers.saved(build)
    pipe = flaxdiff.StableDiffusionPipeline
    for cls, name, options, fault in (
        (pipe, "other", {}, "no model that is known here"),
        (pipe, "vae", {}, "no whole pipeline"),
        (flaxdiff.StableDiffusionXLPipeline, "sd", {}, "not for StableDiffusionXLPipeline"),
        (pipe, "broken", {"tokenizer": str}, "does not follow from the names"),
        (pipe, "broken", {"config": folder}, "missing"),
        (pipe, "odd", {"config": folder}, "more.weight"),
        (pipe, "upscaler", {}, "give config="),
        (flaxdiff.UNet2DConditionModel, "vae", {}, "has no UNet2DConditionModel; it has AutoencoderKL"),
        (flaxdiff.AutoencoderKL, "vae", {"scaling": 1}, "no setting 'scaling'"),
    ):
        with pytest.raises(ValueError, match=fault):
            cls.from_single_file(tmp_path / f"{name}.safetensors", **options)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        pipe.from_single_file(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="stable-diffusion-v1-5"):
        pipe.from_single_file(tmp_path / "sd.safetensors", local_files_only=True)


def test_names_of_a_controlnet():
    """By shapes: diffusers' converter reads in our names what its class holds, and the settings follow from them."""
    settings = dict(cross_attention_dim=768)
    with torch.device("meta"):
        model = diffusers.ControlNetModel(**settings)
        state = model.state_dict()
    old = {original.renamed(original.RULES["ControlNetModel"](model.config), k): v for k, v in state.items()}
    assert old.keys() & {"input_hint_block.14.weight", "zero_convs.11.0.bias", "middle_block_out.0.weight"}
    back = theirs.convert_controlnet_checkpoint({f"control_model.{k}": v for k, v in old.items()}, model.config)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    found = kinds.CONFIGS["ControlNetModel"]({k: tuple(v.shape) for k, v in old.items()}, None)
    for key, value in found.items():
        theirs_ = model.config[key]
        assert value == (list(theirs_) if isinstance(theirs_, tuple) else theirs_), key
