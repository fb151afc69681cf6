"""What diffusers' pipelines do by methods, as methods of ours: the package's own functions under diffusers' names.

A pipeline is frozen, so what changes something returns it: new parameters, or a new pipeline and parameters. Each class
is a list of names; what they do, and what they raise, is said where the functions are.
"""

import os
from collections.abc import Mapping
from typing import Any, Self

from flaxdiff.adapters import custom_diffusion, ip_adapter, lora, textual_inversion
from flaxdiff.core import Params


class LoraBaseMixin:
    """LoRAs of any network: put on, weighed, merged in, taken off.

    >>> import flaxdiff, jax, tempfile
    >>> pipe, params = flaxdiff.load()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pipe.save_lora_weights(folder, flaxdiff.init_lora(pipe, jax.random.key(0)))
    ...     adapted = pipe.load_lora_weights(params, folder, scale=0.5)
    >>> sorted(flaxdiff.adapter_of(adapted)), sorted(flaxdiff.adapter_of(pipe.unload_lora_weights(adapted)))
    (['unet'], [])
    """

    load_lora_weights = lora.load_lora
    lora_state_dict = lora.read_lora
    set_adapters = staticmethod(lora.set_adapters)
    fuse_lora = staticmethod(lora.fuse_lora)
    unfuse_lora = staticmethod(lora.unfuse_lora)
    unload_lora_weights = disable_lora = staticmethod(lora.unload_lora)

    def save_lora_weights(self, folder: str | os.PathLike[str], adapter: lora.Adapter) -> None:
        """See `save_lora`."""
        lora.save_lora(folder, self, adapter)


class PeftAdapterMixin(LoraBaseMixin):
    """LoRAs in PEFT's format are read as all others are."""


class UNet2DConditionLoadersMixin(LoraBaseMixin):
    """The weights of Custom Diffusion."""

    load_attn_procs = custom_diffusion.load_custom_diffusion


class StableDiffusionLoraLoaderMixin(LoraBaseMixin):
    """LoRAs of the U-Net and the text encoder."""


class StableDiffusionXLLoraLoaderMixin(StableDiffusionLoraLoaderMixin):
    """LoRAs of the U-Net and both text encoders."""


class AmusedLoraLoaderMixin(StableDiffusionLoraLoaderMixin):
    """LoRAs of the transformer and the text encoder."""


class SD3LoraLoaderMixin(LoraBaseMixin):
    """LoRAs of the transformer and the text encoders."""


class TextualInversionLoaderMixin:
    """Learned words."""

    load_textual_inversion = textual_inversion.load_textual_inversion


class IPAdapterMixin:
    """Pictures as prompts."""

    load_ip_adapter = ip_adapter.load_ip_adapter


class FromSingleFileMixin:
    """Files with the original names."""

    @classmethod
    def from_single_file(cls, source: str, **options: Any) -> tuple[Self, dict[str, Params]]:
        """Load a pipeline and its parameters from a file with the original names; see `single_file.load_pipeline`."""
        from flaxdiff.checkpoint import single_file

        return single_file.load_pipeline(cls, source, **options)


class PushToHubMixin:
    """Folders in diffusers' layout, here and on the Hub."""

    def save_pretrained(self, folder: str | os.PathLike[str], params: Mapping[str, Params], **options: Any) -> None:
        """Write the pipeline; see `save`."""
        from flaxdiff import checkpoint

        checkpoint.save(folder, self, params, **options)

    def push_to_hub(self, repo: str, params: Mapping[str, Params], **options: Any) -> str:
        """Write the pipeline to a Hub repository; see `push_to_hub`."""
        from flaxdiff import checkpoint

        return checkpoint.push_to_hub(repo, self, params, **options)


class StableDiffusionMixin:
    """What to do about memory; each returns a new pipeline."""

    def enable_attention_slicing(self) -> Self:
        """The same pipeline with attention computed in slices: less memory, some time."""
        return self.replace(**{name: spec.replace(attention="sliced") for name, spec in self.specs})

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> Self:
        """The same pipeline with FreeU on unless a call says `freeu=` itself; see nn/freeu.py."""
        return self.by_default(freeu=(s1, s2, b1, b2))

    def enable_vae_slicing(self) -> Self:
        """The same pipeline with pictures encoded and decoded one at a time: the memory of one, whatever the batch."""
        return self._with_autoencoder(slicing=True)

    def enable_vae_tiling(self, side: int | None = None) -> Self:
        """The same pipeline with large pictures encoded and decoded in tiles that overlap, see `nn/tiling.py`.

        Args:
          side: of a tile in pixels; by default, as in diffusers, what the autoencoder was trained on.

        >>> import flaxdiff
        >>> flaxdiff.load()[0].enable_vae_tiling().vae.config.tiling
        64
        """
        size = self.autoencoder.config.sample_size
        return self._with_autoencoder(tiling=side or (size[0] if isinstance(size, tuple) else size))

    def _with_autoencoder(self, **settings: Any) -> Self:
        """The same pipeline with some settings of its autoencoder changed."""
        changed = {name: spec.replace(**settings) for name, spec in self.specs if spec == self.autoencoder}
        return self.replace(**changed)
