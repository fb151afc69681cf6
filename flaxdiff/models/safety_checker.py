"""StableDiffusionSafetyChecker: which pictures a checkpoint would rather not show.

CLIP's embedding of a picture is compared with those of seventeen concepts, each with a threshold of its own. Where one
of three further concepts is near, all thresholds are lower.

Reference: Rando et al., Red-Teaming the Stable Diffusion Safety Filter, 2022.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff.core import Model, Spec, param
from flaxdiff.models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer
from flaxdiff.nn.layers import Linear, ones, value

CONCEPTS, SPECIAL = 17, 3
STRICTER = 0.01  # by how much thresholds are lower where a special concept is near


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """The cosines of the angles between vectors [B, D] and [N, D]: [B, N], in float32.

    >>> cosine(jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])).round(3)
    Array([[0.6, 0.8]], dtype=float32)
    """
    unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
    return unit(x.astype(jnp.float32)) @ unit(y.astype(jnp.float32)).T


class StableDiffusionSafetyChecker(Model):
    """Whether pictures show what is not to be shown.

    >>> import flaxdiff
    >>> vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    >>> spec = StableDiffusionSafetyChecker.from_config({"vision_config": {**vision, "patch_size": 8}})
    >>> flaxdiff.apply(spec, flaxdiff.init(spec, jax.random.key(0)), jnp.zeros((1, 16, 16, 3)))
    Array([False], dtype=bool)
    """

    config_class = CLIPVisionConfig
    library, package = "transformers", "stable_diffusion"
    renames = ((r"^vision_model\.vision_model\.", "vision_model."),)
    ignored = r"(vision_model\.)+embeddings\.position_ids"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """The spec of a `config.json` of CLIP, of whose two halves the one for pictures is read."""
        vision = config.get("vision_config") or {}
        if not isinstance(vision, Mapping):
            raise ValueError(f"{cls.__name__}: vision_config={vision!r} is no object of settings; give one.")
        return super().from_config({**vision, "projection_dim": CLIPVisionConfig.projection_dim, **config})

    @classmethod
    def to_config(cls, config: CLIPVisionConfig) -> dict[str, Any]:
        """transformers' form of CLIP."""
        vision = super().to_config(config)
        del vision["_class_name"]
        own = {"architectures": [cls.__name__], "model_type": "clip", "projection_dim": config.projection_dim}
        return own | {"vision_config": {"model_type": "clip_vision_model", **vision}}

    def __init__(self, config: CLIPVisionConfig):
        width = config.projection_dim
        self.vision_model = CLIPVisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, width, bias=False)
        self.concept_embeds, self.special_care_embeds = (param((n, width), "raw", ones) for n in (CONCEPTS, SPECIAL))
        self.concept_embeds_weights, self.special_care_embeds_weights = (
            param((n,), "raw", ones) for n in (CONCEPTS, SPECIAL)
        )

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Normalised pictures [B, S, S, 3], see `images.clip_pixels` -> bool [B].

        Scores, cosines above their thresholds, count in thousandths.
        """
        embeds = self.visual_projection(self.vision_model(pixel_values)[1])

        def near(concepts: Any, thresholds: Any, more: jax.Array | float) -> jax.Array:
            scores = cosine(embeds, value(concepts)) - value(thresholds).astype(jnp.float32) + more
            return (jnp.round(1000 * scores) > 0).any(-1, keepdims=True)

        special = near(self.special_care_embeds, self.special_care_embeds_weights, 0.0)
        stricter = jnp.where(special, STRICTER, 0.0)
        return near(self.concept_embeds, self.concept_embeds_weights, stricter)[:, 0]
