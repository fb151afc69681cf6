"""unCLIP, as Karlo publishes it: an embedding of a picture, then a small picture, then a large one, in pixels.

A prior finds the embedding from a text, or the image encoder from a picture; a U-Net that attends to both draws 64
pixels a side; two others make 256 of them, of which the second takes the last step only.

Reference: Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents, 2022.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff import core
from flaxdiff.pipelines import prior
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Family, Inputs, Networks, Size
from flaxdiff.pipelines.inputs import prepare_inputs
from flaxdiff.pipelines.pipeline import Before, DiffusionPipeline
from flaxdiff.pipelines.stable_unclip import embedded, shown
from flaxdiff.pipelines.unconditional import latent_shape, prepare_nothing

# --- a small picture ------------------------------------------------------------------------------------------------


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    image: Any = None,
    image_embeddings: jax.Array | None = None,
) -> dict[str, Any]:
    """A picture to vary, with an empty prompt.

    Args:
      image: Pillow pictures or arrays [B, H, W, 3] in [0, 1]; or
      image_embeddings: what the image encoder made of some, [B, D].
    """
    return prior.prepare(pipe, size, guided, "") | shown(pipe, image, image_embeddings)


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """What each branch attends to, text and picture, and what it adds to the time; the negative one sees no picture."""
    cond, image = {}, embedded(networks, inputs)
    extra = networks.config("text_proj").clip_extra_context_tokens
    for branch, pooled, states, mask in prior.described(networks, inputs):
        context, time = networks("text_proj", image if branch == "positive" else None, pooled, states)
        mask = jnp.pad(mask, ((0, 0), (extra, 0)), constant_values=True)
        cond[branch] = {"text": networks("unet", context, mask, method="keys_values"), "class_labels": time}
    return cond


def decode(networks: Networks, images: jax.Array) -> jax.Array:
    """The sample is the picture, in [-1, 1]."""
    return jnp.clip(images, -1, 1)


DECODER = Family(prior.prepare, encode, sd.predict, latent_shape, decode, times=sd.times)


class DecoderPipeline(DiffusionPipeline):
    """A small picture of a text and an embedding that goes with it."""

    family = DECODER
    defaults = {"num_inference_steps": 25, "guidance_scale": 8.0}


class VariationPipeline(DecoderPipeline):
    """A small picture like a given one."""

    family = DECODER._replace(prepare=prepare)


# --- a large picture ------------------------------------------------------------------------------------------------


def enlarged(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The small picture at the size of the large one, beside the sample; and the time of the last step."""
    small, size, plan = inputs["small"], inputs["size"], inputs["plan"]
    large = jax.image.resize(small, (len(small), size.height, size.width, small.shape[-1]), "cubic")
    last = jnp.asarray(plan.timesteps)[jnp.asarray(plan.steps) - 1]
    return {"positive": {"beside": large, "last": jnp.broadcast_to(last, len(small))}}


def predict(networks: Networks, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """What one network says at all times but the last, and another then."""
    run = lambda name: lambda: networks(f"super_res_{name}", x, t)
    return jax.lax.cond(t == cond["last"][0], run("last"), run("first"))


def sample_shape(specs: Mapping[str, core.Spec], size: Size) -> tuple[int, int, int]:
    """The shape of a picture: half of what the network reads, beside the small one."""
    return size.height, size.width, specs["super_res_first"].config.in_channels // 2


DECODED = (("unet", "decoder"), ("scheduler", "decoder_scheduler"))
DECODED += tuple((name, name) for name in ("text_proj", "text_encoder", "tokenizer"))


class UnCLIPImageVariationPipeline(DiffusionPipeline):
    """Pictures like a given one, in two loops.

    What begins with `decoder_` is for the first, with `super_res_` for the second, as in `decoder_guidance_scale` and
    `super_res_num_inference_steps`.
    """

    family = Family(prepare_nothing, enlarged, predict, sample_shape, decode, loop=r"super_res")
    before = (Before("decoder", "small", VariationPipeline, (*DECODED, ("image_encoder", "image_encoder"))),)
    sampler = "super_res_scheduler"
    reads = ("image_encoder",)
    defaults = {"num_inference_steps": 7, "guidance_scale": 1.0}

    def prepare_inputs(self, prompt: Any = None, **options: Any) -> dict[str, Any]:
        """As of every pipeline; what begins with `super_res_` is for the last loop."""
        return prepare_inputs(self, prompt, **{k.removeprefix("super_res_"): v for k, v in options.items()})


class UnCLIPPipeline(UnCLIPImageVariationPipeline):
    """Text to image in three loops; `prior_` begins what is for the first of them, which finds the embedding."""

    before = (
        Before(
            "prior",
            "image_embeds",
            prior.PriorPipeline,
            (
                ("scheduler", "prior_scheduler"),
                *((name, name) for name in ("prior", "text_encoder", "tokenizer")),
            ),
        ),
        Before("decoder", "small", DecoderPipeline, DECODED),
    )
    reads = ()
