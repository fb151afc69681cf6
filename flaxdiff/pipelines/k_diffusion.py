"""Text to image with the samplers of k-diffusion, by their names there: `pipe.set_scheduler("sample_heun")`."""

from typing import Any, Self

from flaxdiff.pipelines.stable_diffusion import StableDiffusionPipeline
from flaxdiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from flaxdiff.schedulers.names import K_SAMPLERS, scheduler


class KDiffusion:
    """What the two classes add to the plain ones."""

    def set_scheduler(self, name: str, **changes: Any) -> Self:
        """The same pipeline with a sampler of k-diffusion.

        Args:
          name: e.g. "sample_dpmpp_2m".
          **changes: options of the scheduler behind it, such as `use_karras_sigmas=True`.

        Raises:
          ValueError: no such sampler.
        """
        if name not in K_SAMPLERS:
            raise ValueError(f"{name!r} is no sampler of k-diffusion; there are {', '.join(K_SAMPLERS)}.")
        return self.replace(scheduler=scheduler(K_SAMPLERS[name], self.scheduler, **changes))


class StableDiffusionKDiffusionPipeline(KDiffusion, StableDiffusionPipeline):
    """Text to image with Stable Diffusion 1 or 2 and k-diffusion's samplers.

    >>> import flaxdiff
    >>> pipe, params = flaxdiff.StableDiffusionKDiffusionPipeline.from_pretrained(flaxdiff.EMOJI)
    >>> type(pipe.set_scheduler("sample_heun").scheduler).__name__
    'HeunDiscreteScheduler'
    """


class StableDiffusionXLKDiffusionPipeline(KDiffusion, StableDiffusionXLPipeline):
    """Text to image with Stable Diffusion XL and k-diffusion's samplers."""
