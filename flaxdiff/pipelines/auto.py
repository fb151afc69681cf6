"""The right pipeline for a task, found by what a checkpoint, or a pipeline at hand, was made for.

Which classes belong together is `registry.COUNTERPARTS`; nothing here knows any of them. With `controlnet=` the class
is one that ControlNets lead, with `enable_pag=True` one with perturbed attention.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from flaxdiff import registry
from flaxdiff.pipelines.pipeline import DiffusionPipeline


class AutoPipeline(DiffusionPipeline):
    """The base of the three; they have no pipelines of their own, but hand out others."""

    purpose: ClassVar[str]

    @classmethod
    def resolve(cls, named: str, given: Mapping[str, Any] = MappingProxyType({})) -> type[DiffusionPipeline]:
        led = given["controlnet"] is not None if "controlnet" in given else None
        return registry.find(registry.counterpart(named, cls.purpose, led, given.get("enable_pag")), "pipeline")

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **changes: Any) -> DiffusionPipeline:
        """The pipeline for this task with the parts of another; see `DiffusionPipeline.from_pipe`.

        With `controlnet=` a spec it is one that ControlNets lead, with `controlnet=None` one that they do not; with
        `enable_pag=True` one with perturbed attention.
        """
        found = cls.resolve(type(pipe).__name__, changes)
        return found.from_pipe(pipe, **{k: v for k, v in changes.items() if k != "enable_pag"})


class AutoPipelineForText2Image(AutoPipeline):
    """Text to image with whatever a checkpoint holds.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.AutoPipelineForText2Image.from_pretrained(flaxdiff.EMOJI)
    >>> type(pipe).__name__
    'StableDiffusionPipeline'
    """

    purpose = "text2image"


class AutoPipelineForImage2Image(AutoPipeline):
    """Image to image with whatever a checkpoint holds.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.load()
    >>> type(flaxdiff.AutoPipelineForImage2Image.from_pipe(pipe)).__name__
    'StableDiffusionImg2ImgPipeline'
    """

    purpose = "image2image"


class AutoPipelineForInpainting(AutoPipeline):
    """Inpainting with whatever a checkpoint holds.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.AutoPipelineForInpainting.from_pretrained(flaxdiff.EMOJI)
    >>> type(pipe).__name__
    'StableDiffusionInpaintPipeline'
    """

    purpose = "inpainting"
