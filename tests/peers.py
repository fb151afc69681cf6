"""The real PyTorch pipelines at tiny configurations with random weights, and how to compare with them.

Each builder returns a diffusers pipeline. `saved` writes one to a folder once per test run. Tests load that folder here
and compare elementwise.
"""

import functools
import json
import tempfile
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from flaxdiff.pipelines import calling
from flaxdiff.schedulers import tables

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

WORDS = 300  # entries of the tiny tokenizer


compared: dict[str, float] = {}  # class -> the largest difference that the running test has seen


def relative(ours, theirs, of: str | None = None) -> float:
    """Largest difference as a share of the largest value; `of`: the class that the table of coverage has it for."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return differs(float(np.abs(ours - theirs).max() / np.abs(theirs).max()), of)


def differs(share: float, of: str | None) -> float:
    """A difference from PyTorch's, noted for a class; conftest.py puts it into the report of the test."""
    if of is not None:
        compared[of] = max(share, compared.get(of, 0.0))
    return share


def programs() -> list[int]:
    """How many programs the calls of pipelines have compiled so far: of each part of a run."""
    return [part._cache_size() for part in (calling._begin, calling._step, calling._decode)]


def with_noise(pipe, params, inputs, noise, key=None):
    """Pictures of a run whose solver is handed this noise [B, h, w, C] for each step, in place of what keys draw.

    Where loops come before, it is all of them whose steps the noise is for, one after the other.
    """
    noise, program = iter(noise), pipe.program
    key = jax.random.key(0) if key is None else key

    def run(program, params, key, inputs):
        conditions, state = program.begin(params, key, inputs)

        def noisy(state, noise):
            """The loop's step: it asks the scheduler's own, which takes noise as an argument."""
            with pytest.MonkeyPatch.context() as patch:
                draw = tables.step
                patch.setattr(tables, "step", lambda sampler, guess, none: draw(sampler, guess, noise))
                return program.step(params, conditions, state)

        step = jax.jit(noisy)
        for _ in range(int(inputs["plan"].steps)):
            state = step(state, next(noise))
        return program.decode(params, state.sampler.sample)

    inputs = program.prepared(run, params, program.keys(key, inputs["index"]), inputs)
    return run(program, params, key, inputs)


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """A model with weights large enough that its output depends on its input; transformers draws tiny ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=(2 / p[0].numel()) ** 0.5)
    return model.eval()


def sure(vae):
    """An autoencoder whose posterior has no spread: PyTorch draws from its own generator, and here the key does."""
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    with torch.no_grad():
        last.bias[vae.config.latent_channels :] -= 60
    return vae


@functools.cache
def tokenizer(pad: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """CLIP's tokenizer with letters for words."""
    folder = Path(tempfile.mkdtemp())
    letters = [chr(c) for c in range(33, 127)]
    vocab = ["!"] + [a for a in letters if a != "!"] + [f"{a}</w>" for a in letters] + ["re", "red</w>"]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=16, pad_token=pad
    )


def text_encoder(projected: bool = False, seed: int = 0, width: int = 16, **options):
    torch.manual_seed(seed)
    ids = tokenizer().convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=24,
        bos_token_id=ids[0],
        eos_token_id=ids[1],
        **options,
    )
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return cls(config).eval()


# T5's tokens, as many as it takes to tell words apart
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
PIECES += [(chr(c), -5.0) for c in range(97, 123)] + [("▁red", -3.0), ("▁a", -3.0), ("ed", -3.5)]


@functools.cache
def t5_tokenizer() -> transformers.T5Tokenizer:
    """T5's tokenizer with letters for words."""
    unused = [(f"<extra_id_{i}>", 0.0) for i in (3, 2, 1, 0)]
    return transformers.T5Tokenizer(vocab=PIECES + unused, extra_ids=4)


def t5_encoder(seed: int = 0, width: int = 16):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=40,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return lively(transformers.T5EncoderModel(config))


def vae(seed: int = 0, **options):
    torch.manual_seed(seed)
    stages = 2
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * stages,
            "up_block_types": ("UpDecoderBlock2D",) * stages,
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "sample_size": 16,
            **options,
        }
    ).eval()


def unet(seed: int = 0, **options):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            **options,
        }
    ).eval()


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion_1():
    scheduler = diffusers.PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(
        vae(), text_encoder(), tokenizer(), unet(), scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_2():
    scheduler = diffusers.DDIMScheduler(
        **SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False
    )
    net = unet(attention_head_dim=(2, 4), use_linear_projection=True)
    encoder = text_encoder(hidden_act="gelu")
    return diffusers.StableDiffusionPipeline(
        vae(), encoder, tokenizer("!"), net, scheduler, None, None, requires_safety_checker=False
    )


def _xl_unet(time_ids: int, **options):
    told = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 8 * time_ids,
        "cross_attention_dim": 32 if time_ids == 6 else 16,
    }
    stages = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
    }
    return unet(**(options or stages), **told)


# a U-Net of one stage, for programs that hold several
SHALLOW = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}


def shallow_stable_diffusion_1():
    pipe = stable_diffusion_1()
    pipe.register_modules(unet=unet(**SHALLOW))
    return pipe


def shallow_stable_diffusion_xl():
    pipe = stable_diffusion_xl()
    pipe.register_modules(unet=_xl_unet(6, **SHALLOW))
    return pipe


def stable_diffusion_xl():
    return diffusers.StableDiffusionXLPipeline(
        vae(),
        text_encoder(),
        text_encoder(projected=True, seed=1, hidden_act="gelu"),
        tokenizer(),
        tokenizer("!"),
        _xl_unet(6),
        diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )


def stable_diffusion_xl_refiner():
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae(),
        None,
        text_encoder(projected=True, seed=1, hidden_act="gelu"),
        None,
        tokenizer("!"),
        _xl_unet(5),
        diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def pixart(told_sizes: bool = False, seed: int = 0):
    """A transformer that was trained on pictures of 256 pixels, whose attentions are narrower than the text."""
    torch.manual_seed(seed)
    return lively(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=32,
            use_additional_conditions=told_sizes,
        )
    )


def small_vae(**options):
    """An autoencoder with four stages: eight pixels to a latent along each side."""
    return vae(
        **{
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            **options,
        }
    )


def pixart_sigma():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(t5_tokenizer(), t5_encoder(), small_vae(), pixart(), scheduler)


def ddpm():
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ).eval()
    return diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(variance_type="fixed_small"))


@functools.cache
def saved(build) -> str:
    """The folder that a pipeline was saved to."""
    folder = tempfile.mkdtemp(prefix="flaxdiff-peer-")
    build().save_pretrained(folder)
    return folder


def saved_config(build) -> dict:
    """The scheduler's configuration as the folder has it: defaults that were written down count as chosen."""
    return json.loads((Path(saved(build)) / "scheduler" / "scheduler_config.json").read_text())


def controlnet(net, seed: int = 0, **options):
    """A ControlNet for a U-Net; what begins at zero is drawn, so that there is something to compare."""
    torch.manual_seed(seed)
    made = diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(8, 16), **options).eval()
    for name, p in made.named_parameters():
        if name.startswith("controlnet"):
            torch.nn.init.normal_(p, std=0.2)
    return made


def image_encoder(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return transformers.CLIPVisionModelWithProjection(config).eval()


def adapter(kind: str = "full_adapter", seed: int = 0, **options):
    """A T2I-Adapter for the tiny U-Nets."""
    torch.manual_seed(seed)
    options = {"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 2} | options
    return diffusers.T2IAdapter(adapter_type=kind, **options).eval()


def ip_adapter(kind: str, net, seed: int = 0) -> dict:
    """An IP-Adapter as its authors' files hold it, for a U-Net and the tiny image encoder."""
    draw = torch.Generator().manual_seed(seed)
    tensor = lambda *shape: torch.randn(shape, generator=draw) / shape[-1] ** 0.5
    cross, seen = net.config.cross_attention_dim, 16  # channels of the text and of the encoder's patches

    def affine(name, fan_in, fan_out):
        return {f"{name}.weight": tensor(fan_out, fan_in), f"{name}.bias": tensor(fan_out)}

    def norm(name, width):
        return {f"{name}.weight": 1 + tensor(width), f"{name}.bias": tensor(width)}

    def resampler(at, read, width, depth=4):
        made = (
            affine(f"{at}proj_in", read, width) | affine(f"{at}proj_out", width, cross) | norm(f"{at}norm_out", cross)
        )
        for i in (f"{at}layers.{i}" for i in range(depth)):
            made |= norm(f"{i}.0.norm1", width) | norm(f"{i}.0.norm2", width) | norm(f"{i}.1.0", width)
            made |= {f"{i}.0.to_q.weight": tensor(64, width), f"{i}.0.to_kv.weight": tensor(128, width)}
            made |= {f"{i}.0.to_out.weight": tensor(width, 64), f"{i}.1.1.weight": tensor(4 * width, width)}
            made[f"{i}.1.3.weight"] = tensor(width, 4 * width)
        return made

    face = affine("proj.0", 12, 24) | affine("proj.2", 24, 4 * cross) | norm("norm", cross)
    projection = {
        "base": lambda: affine("proj", 20, 4 * cross) | norm("norm", cross),
        "full": lambda: affine("proj.0", seen, seen) | affine("proj.2", seen, cross) | norm("proj.3", cross),
        "faceid": lambda: face,
        "plus": lambda: {"latents": tensor(1, 5, 24), **resampler("", seen, 24)},
        "faceid_plus": lambda: face | resampler("perceiver_resampler.", seen, cross),
    }[kind]()
    attentions, width = {}, lambda name: net.get_submodule(name.removesuffix(".processor")).to_q.out_features
    for i, name in enumerate(net.attn_processors):
        if name.endswith("attn2.processor"):
            attentions |= {f"{i}.to_{part}_ip.weight": tensor(width(name), cross) for part in "kv"}
    return {"image_proj": projection, "ip_adapter": attentions}
