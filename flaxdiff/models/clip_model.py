"""CLIPModel: a text encoder and an image encoder whose embeddings of things that belong together point the same way.

Diffusion models are guided and judged by it; the halves alone are in clip.py and clip_vision.py.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from flaxdiff.core import Config, Model, Spec, param
from flaxdiff.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextTransformer
from flaxdiff.models.clip_vision import CLIPVisionConfig, CLIPVisionModelWithProjection, CLIPVisionTransformer
from flaxdiff.nn.layers import Linear, ones

HALVES = {"text_config": CLIPTextModel, "vision_config": CLIPVisionModelWithProjection}


@dataclasses.dataclass(frozen=True)
class CLIPConfig(Config):
    """transformers' keys and defaults: those of the halves, and the width of what they share."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512


class CLIPModel(Model):
    """Both encoders, as published.

    >>> import flaxdiff
    >>> spec = CLIPModel.from_config({"vision_config": {"hidden_size": 1024}})
    >>> flaxdiff.abstract(spec)["visual_projection.weight"].shape
    (1024, 512)
    """

    config_class = CLIPConfig
    library, model_type = "transformers", "clip"
    ignored = r"(text|vision)_model\.embeddings\.position_ids"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """The spec of a `config.json` of CLIP; settings such as `scan_layers` hold for both halves."""
        shared = {f.name: config[f.name] for f in dataclasses.fields(Config) if f.name in config}
        halves = {name: half.from_config({**config.get(name, {}), **shared}).config for name, half in HALVES.items()}
        return super().from_config({**config, **halves})

    @classmethod
    def to_config(cls, config: CLIPConfig) -> dict[str, Any]:
        """transformers' form of CLIP."""
        halves = {name: half.to_config(getattr(config, name)) for name, half in HALVES.items()}
        return super().to_config(config) | halves

    def __init__(self, config: CLIPConfig):
        text, vision = config.text_config, config.vision_config
        self.text_model, self.vision_model = CLIPTextTransformer(text), CLIPVisionTransformer(vision)
        self.text_projection = Linear(text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = param((), "raw", ones)

    def get_text_features(self, input_ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens [B, N], of which those in a mask [B, N] may be seen -> [B, P]."""
        return self.text_projection(self.text_model(input_ids, mask).pooler_output)

    def get_image_features(self, pixel_values: jax.Array) -> jax.Array:
        """Normalised pictures [B, S, S, 3], see `images.clip_pixels` -> [B, P]."""
        return self.visual_projection(self.vision_model(pixel_values)[1])
