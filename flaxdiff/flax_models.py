"""Networks as diffusers' removed Flax classes called them: a module, parameters apart, channels in front."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from flaxdiff.checkpoint import save
from flaxdiff.core import Model, Params, Spec, apply, init
from flaxdiff.models.autoencoder_kl import AutoencoderKL, DiagonalGaussian
from flaxdiff.models.controlnet import ControlNetModel, ControlNetOutput
from flaxdiff.models.unet_2d_condition import UNet2DConditionModel

last = lambda a: jnp.moveaxis(jnp.asarray(a), -3, -1)  # channels, where ours are
front = lambda a: jnp.moveaxis(jnp.asarray(a), -1, -3)  # and where theirs were


class FlaxUNet2DConditionOutput(NamedTuple):
    """The prediction [B, C, h, w]."""

    sample: jax.Array


class FlaxDecoderOutput(NamedTuple):
    """The picture [B, C, H, W]."""

    sample: jax.Array


class FlaxAutoencoderKLOutput(NamedTuple):
    """The posterior of the latent, its channels last."""

    latent_dist: DiagonalGaussian


@dataclasses.dataclass(frozen=True)
class FlaxModelMixin:
    """The base of the Flax networks: a spec, and the calls that those had."""

    spec: Spec
    model_class: ClassVar[type[Model]]

    @classmethod
    def from_pretrained(
        cls, repo: str | os.PathLike[str], *, from_pt: bool = False, **options: Any
    ) -> tuple[Self, Params]:
        """The network and its parameters, options as of `load_model`; with or without from_pt PyTorch's files."""
        spec, params = cls.model_class.from_pretrained(repo, **options)
        return cls(spec), params

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The network that a configuration describes."""
        return cls(cls.model_class.from_config(config))

    @property
    def config(self) -> Any:
        """The configuration."""
        return self.spec.config

    def init_weights(self, rng: jax.Array) -> Params:
        """Parameters to begin with."""
        return init(self.spec, rng)

    def save_pretrained(self, folder: str | os.PathLike[str], params: Params) -> None:
        """Write the network; see `save`."""
        save(folder, self.spec, params)

    def to_bf16(self, params: Params) -> Params:
        """The parameters in bfloat16."""
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)

    def to_fp16(self, params: Params) -> Params:
        """The parameters in float16."""
        return jax.tree.map(lambda a: a.astype(jnp.float16), params)

    def to_fp32(self, params: Params) -> Params:
        """The parameters in float32."""
        return jax.tree.map(lambda a: a.astype(jnp.float32), params)

    def apply(self, variables: Mapping[str, Params], *args: Any, method: Callable | None = None, **options: Any) -> Any:
        """Run the network, or one of its methods, with `{"params": params}`, as Flax does."""
        return (method or self.__call__)(variables["params"], *args, **options)


class FlaxUNet2DConditionModel(FlaxModelMixin):
    """The U-Net of Stable Diffusion.

    >>> import flaxdiff
    >>> unet, params = FlaxUNet2DConditionModel.from_pretrained(flaxdiff.EMOJI, subfolder="unet")
    >>> unet.apply({"params": params}, jnp.zeros((1, 8, 16, 16)), 10, jnp.zeros((1, 5, 256))).sample.shape
    (1, 8, 16, 16)
    """

    model_class = UNet2DConditionModel

    def __call__(
        self, params: Params, sample: jax.Array, timesteps: Any, encoder_hidden_states: jax.Array, **options: Any
    ) -> FlaxUNet2DConditionOutput:
        """Noisy latents [B, C, h, w] -> the prediction; options as of `UNet2DConditionModel`."""
        made = apply(self.spec, params, last(sample), jnp.asarray(timesteps), encoder_hidden_states, **options)
        return FlaxUNet2DConditionOutput(front(made))


class FlaxControlNetModel(FlaxModelMixin):
    """A ControlNet; what it returns goes to the U-Net as it is."""

    model_class = ControlNetModel

    def __call__(
        self,
        params: Params,
        sample: jax.Array,
        timesteps: Any,
        encoder_hidden_states: jax.Array,
        controlnet_cond: jax.Array,
        conditioning_scale: float = 1.0,
    ) -> ControlNetOutput:
        """Noisy latents [B, C, h, w] and pictures [B, 3, H, W] in [0, 1] -> what is added to the U-Net."""
        given = last(sample), jnp.asarray(timesteps), encoder_hidden_states, last(controlnet_cond), conditioning_scale
        return apply(self.spec, params, *given)


FlaxControlNetOutput = ControlNetOutput


class FlaxAutoencoderKL(FlaxModelMixin):
    """The autoencoder of Stable Diffusion.

    >>> import flaxdiff
    >>> vae, params = FlaxAutoencoderKL.from_pretrained(flaxdiff.EMOJI, subfolder="vae")
    >>> vae.apply({"params": params}, jnp.zeros((1, 3, 64, 64)), method=vae.encode).latent_dist.mean.shape
    (1, 16, 16, 8)
    """

    model_class = AutoencoderKL

    def encode(self, params: Params, sample: jax.Array) -> FlaxAutoencoderKLOutput:
        """Pictures [B, C, H, W] in [-1, 1] -> the posterior."""
        return FlaxAutoencoderKLOutput(apply(self.spec, params, last(sample), method="encode"))

    def decode(self, params: Params, latents: jax.Array) -> FlaxDecoderOutput:
        """Latents, channels in front or last -> pictures [B, C, H, W]."""
        latents = latents if latents.shape[-1] == self.config.latent_channels else last(latents)
        return FlaxDecoderOutput(front(apply(self.spec, params, latents, method="decode")))

    def __call__(self, params: Params, sample: jax.Array) -> FlaxDecoderOutput:
        """Pictures [B, C, H, W] there and back, by the mean of the posterior."""
        return self.decode(params, self.encode(params, sample).latent_dist.mean)
