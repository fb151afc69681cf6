"""The pipelines that diffusers names after how they are guided: others, with another rule by default.

What strengths a rule takes are options of the call: `pag_scale`, `sag_scale`, `sld_guidance_scale`, …, see
`guidance/presets.py`. Any other pipeline is guided so by `pipe.replace(guidance=flaxdiff.guidance.perturbed)`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Self

import numpy as np

from flaxdiff.guidance import attended, away_from_harm, perturbed, self_attention, semantic
from flaxdiff.pipelines import controlled
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines import stable_diffusion_xl as xl
from flaxdiff.pipelines.generate import Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.text import further, texts, words

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


THRESHOLDS = MappingProxyType({0: 0.05, 10: 0.5, 20: 0.8})


def excited(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    token_indices: Sequence[int] | Sequence[Sequence[int]] | None = None,
    thresholds: Mapping[int, float] = THRESHOLDS,
) -> dict[str, np.ndarray]:
    """Which tokens are to be attended to.

    Args:
      token_indices: places in the prompt, as `get_indices` counts them; a list, or one for each prompt.
      thresholds: evaluation -> how much attention each is to have then.

    Raises:
      ValueError: none, lists for another number of prompts, a place that no token of the prompt has.
    """
    prompts = texts(prompt)
    if not token_indices:
        raise ValueError(f"{type(pipe).__name__} needs token_indices; get_indices(prompt) counts them.")
    lists = [token_indices] if np.ndim(token_indices[0]) == 0 else list(token_indices)
    if len(lists) not in (1, len(prompts)):
        raise ValueError(f"token_indices has {len(lists)} lists for {len(prompts)} prompts; give one for each.")
    ids = pipe.tokenizer(prompts)
    tokens = np.zeros((len(prompts), ids.shape[1]), np.float32)
    for row, (of, text) in enumerate(zip(lists * (len(prompts) // len(lists)), prompts, strict=True)):
        last = words(ids[row])
        if wrong := [i for i in of if not 1 <= i <= last]:
            raise ValueError(f"token_indices: {wrong[0]} is no place of a word of {text!r}, which are 1 to {last}.")
        tokens[row, list(of)] = 1
    table = {"excited_steps": [*thresholds], "excited_thresholds": [*thresholds.values()]}
    return {"excited_tokens": tokens} | {k: np.float32([v]) for k, v in table.items()}


class StableDiffusionAttendAndExcitePipeline(sd.StableDiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2 that makes sure of some words.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.StableDiffusionAttendAndExcitePipeline.from_pretrained(flaxdiff.EMOJI)
    >>> pipe.get_indices("red apple")[1]
    'red'
    """

    guides = staticmethod(attended)
    extras = (excited,)

    def get_indices(self, prompt: str) -> dict[int, str]:
        """The tokens of a prompt by their places."""
        ids = self.tokenizer([prompt])[0]
        return dict(enumerate(token.removesuffix("</w>") for token in self.tokenizer.loaded.convert_ids_to_tokens(ids)))


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
