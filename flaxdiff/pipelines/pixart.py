"""PixArt-α and PixArt-Σ: T5's reading of a prompt, a transformer over patches, and an autoencoder.

Prompts are read in small letters. The network was trained on pictures of several sizes, see tasks/binned.py.

Reference: Chen et al., PixArt-α: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis,
2023; PixArt-Σ: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation, 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff.models.pixart_transformer_2d import SIZES
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.guided import PAGMixin
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.tasks.binned import filling, text_to_image_of_any_size
from flaxdiff.pipelines.text import branches, check_prompts, check_together, texts


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    prompt_embeds: jax.Array | None = None,
    prompt_attention_mask: jax.Array | None = None,
    negative_prompt_embeds: jax.Array | None = None,
    negative_prompt_attention_mask: jax.Array | None = None,
    max_sequence_length: int | None = None,
    clean_caption: bool = False,
) -> dict[str, Any]:
    """The prompts as tokens, or as embeddings where those are given, and the size of the picture.

    Args:
      prompt, negative_prompt: what to draw and what to avoid; one text or several.
      prompt_embeds, prompt_attention_mask, …: in their place, [B, N, D], and which of those words may be seen, [B, N].
      max_sequence_length: tokens of a prompt; what is beyond is not read. By default as the class was trained.
      clean_caption: must be False; prompts are read as they are given.

    Raises:
      ValueError: no prompt, embeddings without a mask, or `clean_caption`.
    """
    if clean_caption:
        raise ValueError("clean_caption=True is not offered; give prompts as they are to be read, and leave it out.")
    prompts = check_prompts(pipe, prompt, prompt_embeds)
    sources = {"": (prompts, prompt_embeds, prompt_attention_mask)}
    if guided:
        sources["negative_"] = negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
    arrays: dict[str, Any] = {}
    for prefix, (text, embeds, mask) in sources.items():
        check_together(**{f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_attention_mask": mask})
        if embeds is not None:
            arrays |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_mask": np.asarray(mask, bool)}
            continue
        small = [words.lower().strip() for words in texts(text)]
        arrays[f"{prefix}prompt_ids"] = pipe.tokenizer(small, max_sequence_length or pipe.longest)
    if pipe.transformer.config.told_sizes:
        arrays["resolution"] = np.float32([[size.height, size.width]])
        arrays["aspect_ratio"] = np.float32([[size.height / size.width]])
    return arrays


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch as the transformer reads it, which words are to be seen, and the size."""
    cond = {}
    sizes = {name: jnp.asarray(inputs[name]) for name in SIZES if name in inputs}
    for branch, prefix in branches(inputs).items():
        if f"{prefix}prompt_embeds" in inputs:
            text, mask = inputs[f"{prefix}prompt_embeds"], jnp.asarray(inputs[f"{prefix}prompt_mask"])
        else:
            ids = jnp.asarray(inputs[f"{prefix}prompt_ids"])
            mask = ids != networks.config("text_encoder").pad_token_id
            text = networks("text_encoder", ids, mask)
        cond[branch] = {"text": networks("transformer", text, method="keys_values"), "mask": mask, **sizes}
    return cond


def times(networks: Networks, timesteps: jax.Array, cond: Cond) -> Any:
    """What the transformer makes of times [N], and of sizes."""
    return networks("transformer", timesteps[:, None], cond, method="times")


def predict(networks: Networks, x: jax.Array, t: Any, cond: Cond) -> jax.Array:
    """The noise; that the transformer also predicts its variance is of no use to the solvers."""
    output, channels = networks("transformer", x, cond["text"], t, None, cond["mask"], cond.get("perturb")), x.shape[-1]
    return output[..., :channels] if output.shape[-1] // 2 == channels else output


def decode(networks: Networks, latents: jax.Array, size: Size | None = None, **told: jax.Array) -> jax.Array:
    """Latents -> images in [-1, 1], of another size where one is given."""
    images = sd.decode(networks, latents, **told)
    return images if size is None else filling(images, size)


PIXART = sd.STABLE_DIFFUSION._replace(
    prepare=prepare,
    encode=encode,
    predict=predict,
    decode=decode,
    times=times,
    distilled=None,
    loop="transformer",
)


class PixArtAlphaPipeline(DiffusionPipeline):
    """Text to image with PixArt-α.

    >>> import flaxdiff
    >>> transformer = flaxdiff.PixArtTransformer2DModel.from_config({"sample_size": 128})
    >>> specs = ("transformer", transformer), ("vae", flaxdiff.AutoencoderKL.from_config({"block_out_channels": [8] * 4,
    ...     "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    ...     "norm_num_groups": 8}))
    >>> pipe = PixArtAlphaPipeline(specs, flaxdiff.DPMSolverMultistepScheduler())
    >>> told = dict(prompt_embeds=np.zeros((1, 5, 1152)), prompt_attention_mask=np.ones((1, 5)), guidance_scale=1.0)
    >>> pipe.prepare_inputs(**told, height=600, width=900)["size"]
    Size(height=832, width=1216)
    """

    family = PIXART
    task = staticmethod(text_to_image_of_any_size)
    formerly = {"Transformer2DModel": "PixArtTransformer2DModel"}
    defaults = {"num_inference_steps": 20, "guidance_scale": 4.5}
    longest = 120  # tokens of a prompt


class PixArtSigmaPipeline(PixArtAlphaPipeline):
    """Text to image with PixArt-Σ, which reads longer prompts and makes larger pictures."""

    longest = 300


class PixArtSigmaPAGPipeline(PAGMixin, PixArtSigmaPipeline):
    """Text to image with PixArt-Σ."""

    defaults = {**PixArtSigmaPipeline.defaults, "pag_applied_layers": ("blocks.1",)}
