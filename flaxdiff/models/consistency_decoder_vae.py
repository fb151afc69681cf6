"""ConsistencyDecoderVAE: the encoder of Stable Diffusion 1 with the decoder of DALL-E 3.

The decoder is a small diffusion model of its own, which sees the latent beside a noisy image and is distilled to two
steps; the same latents come out with better faces and letters.

Reference: Song et al., Consistency Models, 2023; https://github.com/openai/consistencydecoder.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff.core import only
from flaxdiff.models.autoencoder import AutoencoderConfig
from flaxdiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Encoder
from flaxdiff.models.unet_2d import UNet2DConfig, UNet2DModel
from flaxdiff.nn.layers import Conv
from flaxdiff.schedulers import ConsistencyDecoderScheduler, tables

# of Stable Diffusion 1's latents, channel by channel
MEANS = (0.38862467, 0.02253063, 0.07381133, -0.0171294)
STDS = (0.9654121, 1.0440036, 0.76147926, 0.77022034)


@dataclasses.dataclass(frozen=True)
class ConsistencyDecoderVAEConfig(AutoencoderConfig):
    """diffusers' keys and defaults."""

    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latent_channels: int = 4
    sample_size: int = 32
    block_out_channels: tuple[int, ...] | None = None  # written beside the encoder's, the same
    force_upcast: bool = False
    encoder_act_fn: str = "silu"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_double_z: bool = only(True)
    encoder_down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    encoder_in_channels: int = 3
    encoder_layers_per_block: int = 2
    encoder_norm_num_groups: int = 32
    encoder_out_channels: int = 4
    decoder_add_attention: bool = False
    decoder_block_out_channels: tuple[int, ...] = (320, 640, 1024, 1024)
    decoder_down_block_types: tuple[str, ...] = ("ResnetDownsampleBlock2D",) * 4
    decoder_downsample_padding: int = 1
    decoder_in_channels: int = 7
    decoder_layers_per_block: int = 3
    decoder_norm_eps: float = 1e-05
    decoder_norm_num_groups: int = 32
    decoder_num_train_timesteps: int = 1024
    decoder_out_channels: int = 6
    decoder_resnet_time_scale_shift: str = "scale_shift"
    decoder_time_embedding_type: str = "learned"
    decoder_up_block_types: tuple[str, ...] = ("ResnetUpsampleBlock2D",) * 4

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", self.encoder_block_out_channels)
        super().__post_init__()

    def half(self, side: str) -> dict[str, Any]:
        """The keys of the "encoder" or the "decoder", without that word."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.startswith(side)}
        return {name.removeprefix(f"{side}_"): value for name, value in named.items() if "double_z" not in name}


class ConsistencyDecoderVAE(AutoencoderKL):
    """Encode images into latents and decode them in two steps, see the module's paragraph.

    >>> import flaxdiff
    >>> small = dict(encoder_block_out_channels=[32] * 4, decoder_block_out_channels=[32] * 4)
    >>> spec = ConsistencyDecoderVAE.from_config(small)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 2, 2, 4)), method="decode").shape
    (1, 16, 16, 3)
    """

    config_class = ConsistencyDecoderVAEConfig

    def __init__(self, config: ConsistencyDecoderVAEConfig):
        c = config
        up = ("UpDecoderBlock2D",) * len(c.encoder_block_out_channels)
        self.encoder = Encoder(AutoencoderKLConfig(up_block_types=up, **c.half("encoder")), 2 * c.encoder_out_channels)
        self.decoder_unet = UNet2DModel(UNet2DConfig(**c.half("decoder")))
        self.quant_conv = Conv(2 * c.latent_channels, 2 * c.latent_channels, kernel=1, padding=0)
        self.config = c

    def decode(self, latent: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Latent [B, h, w, Z], unscaled -> image [B, H, W, C], about [-1, 1]; noise of `key`, or always the same.

        It is decoded whole: `slicing` and `tiling` are for the encoder, as in diffusers.
        """
        c, factor = self.config, self.config.factor
        z = (latent.astype(jnp.float32) * c.scaling_factor - jnp.array(MEANS)) / jnp.array(STDS)
        z = jnp.repeat(jnp.repeat(z, factor, 1), factor, 2)
        first, rest = jax.random.split(jax.random.key(0) if key is None else key)
        plan = ConsistencyDecoderScheduler().plan(2)
        noise = plan.init_noise_sigma * jax.random.normal(first, (*z.shape[:3], 3))
        state = tables.init(plan, noise, rest)
        for _ in range(2):
            output = self.decoder_unet(jnp.concatenate([state.model_input, z], -1), state.timestep)
            state = tables.step(state, output[..., :3].astype(jnp.float32))
        return state.sample
