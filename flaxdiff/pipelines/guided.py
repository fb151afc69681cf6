"""The pipelines that diffusers names after how they are guided: others, with another rule by default.

What strengths a rule takes are options of the call: `pag_scale`, `sag_scale`, `sld_guidance_scale`, …, see
`guidance/presets.py`. Any other pipeline is guided so by `pipe.replace(guidance=flaxdiff.guidance.perturbed)`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Self

import numpy as np

from flaxdiff.guidance import away_from_harm, perturbed, self_attention, semantic
from flaxdiff.pipelines import controlled
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import stable_diffusion_xl as xl
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.text import further

# --- perturbed attention ---------------------------------------------------------------------------------------------


class PAGMixin:
    """Guidance by perturbed attention."""

    guides = staticmethod(perturbed)

    def set_pag_applied_layers(self, pag_applied_layers: str | list[str]) -> Self:
        """The same pipeline with these layers perturbed unless a call says others.

        >>> import flaxdiff
        >>> pipe, params = flaxdiff.StableDiffusionPAGPipeline.from_pretrained(flaxdiff.EMOJI)
        >>> pipe = pipe.set_pag_applied_layers(["mid", "up_blocks.0"])
        >>> [int(flags.sum()) for flags in pipe.prepare_inputs(prompt="cat")["guidance"]["pag_applied_layers"]]
        [0, 0, 1, 1, 1, 0, 0]
        """
        return self.by_default(pag_applied_layers=pag_applied_layers)


class StableDiffusionPAGPipeline(PAGMixin, sd.StableDiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2."""


class StableDiffusionPAGImg2ImgPipeline(PAGMixin, sd.StableDiffusionImg2ImgPipeline):
    """Image to image with Stable Diffusion 1 or 2."""


class StableDiffusionPAGInpaintPipeline(PAGMixin, sd.StableDiffusionInpaintPipeline):
    """Inpainting with Stable Diffusion 1 or 2."""


class StableDiffusionControlNetPAGPipeline(PAGMixin, controlled.StableDiffusionControlNetPipeline):
    """Text to image with Stable Diffusion 1 or 2, led by ControlNets."""


class StableDiffusionControlNetPAGInpaintPipeline(PAGMixin, controlled.StableDiffusionControlNetInpaintPipeline):
    """Inpainting with Stable Diffusion 1 or 2, led by ControlNets."""


class StableDiffusionXLPAGPipeline(PAGMixin, xl.StableDiffusionXLPipeline):
    """Text to image with Stable Diffusion XL."""


class StableDiffusionXLPAGImg2ImgPipeline(PAGMixin, xl.StableDiffusionXLImg2ImgPipeline):
    """Image to image with Stable Diffusion XL."""


class StableDiffusionXLPAGInpaintPipeline(PAGMixin, xl.StableDiffusionXLInpaintPipeline):
    """Inpainting with Stable Diffusion XL."""


class StableDiffusionXLControlNetPAGPipeline(PAGMixin, controlled.StableDiffusionXLControlNetPipeline):
    """Text to image with Stable Diffusion XL, led by ControlNets."""


class StableDiffusionXLControlNetPAGImg2ImgPipeline(PAGMixin, controlled.StableDiffusionXLControlNetImg2ImgPipeline):
    """Image to image with Stable Diffusion XL, led by ControlNets."""


# --- self-attention, further prompts ---------------------------------------------------------------------------------


class StableDiffusionSAGPipeline(sd.StableDiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, away from what it says of a sample that is blurred where it looks."""

    guides = staticmethod(self_attention)


def edits(
    pipe: DiffusionPipeline, size: Size, guided: bool, editing_prompt: str | Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Further prompts to go towards.

    Args:
      editing_prompt: one text or several, for all pictures alike.
    """
    return {} if editing_prompt is None or not guided else further(pipe, "editing", editing_prompt)


class SemanticStableDiffusionPipeline(sd.StableDiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, towards further prompts where they matter."""

    guides = staticmethod(semantic)
    extras = (edits,)


HARM = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)


def harm(pipe: DiffusionPipeline, size: Size, guided: bool, safety_concept: str | None = None) -> dict[str, np.ndarray]:
    """A prompt to keep away from.

    Args:
      safety_concept: by default as the checkpoint says, or a list of what does harm.
    """
    concept = safety_concept or dict(pipe.settings).get("safety_concept") or HARM
    return further(pipe, "safety", concept) if guided else {}


def _levels(*values: float) -> Mapping[str, float]:
    names = "sld_warmup_steps", "sld_guidance_scale", "sld_threshold", "sld_momentum_scale", "sld_mom_beta"
    return MappingProxyType(dict(zip(names, values, strict=True)))


class SafetyConfig:
    """How strongly `StableDiffusionPipelineSafe` keeps away: options for its call."""

    WEAK = _levels(15, 20, 0.0, 0.0, 0.0)
    MEDIUM = _levels(10, 1000, 0.01, 0.3, 0.4)
    STRONG = _levels(7, 2000, 0.025, 0.5, 0.7)
    MAX = _levels(0, 5000, 1.0, 0.5, 0.7)


class StableDiffusionPipelineSafe(sd.StableDiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2, away from what does harm."""

    guides = staticmethod(away_from_harm)
    extras = (harm,)
