"""FluxControlNetModel: fewer blocks of Flux's transformer that read a picture as well, and what they add to all of its.

The picture enters as the tokens of its latent, or, where there is an `input_hint_block`, through a few convolutions. A
union of several kinds of control is told which kind it is: a token before the text's.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxdiff import core
from flaxdiff.core import Params, Spec, param
from flaxdiff.models.controlnet import ControlNetConditioningEmbedding
from flaxdiff.models.flux_transformer_2d import FluxBlocks, FluxConfig, Told
from flaxdiff.nn.layers import Embedding, Linear, zeros
from flaxdiff.nn.packing import pack
from flaxdiff.nn.stack import over, stack, states
from flaxdiff.parallel import constrain


@dataclasses.dataclass(frozen=True)
class FluxControlNetConfig(FluxConfig):
    """diffusers' keys and defaults."""

    num_mode: int | None = None
    conditioning_embedding_channels: int | None = None

    @property
    def conditioning_channels(self) -> int:
        """Channels of the picture."""
        return 3


class FluxControlNetOutput(NamedTuple):
    """What is added to the picture's tokens behind the blocks of each kind, [K, B, N, D]; None where it has none."""

    controlnet_block_samples: jax.Array | None
    controlnet_single_block_samples: jax.Array | None


class ZeroLinear(Linear):
    """A linear layer that begins at zero."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out)
        self.weight, self.bias = param((fan_in, fan_out), "linear", zeros), param((fan_out,), "raw", zeros)


class FluxControlNetModel(FluxBlocks):
    """What a picture adds to the blocks of Flux's transformer.

    >>> import flaxdiff
    >>> tiny = dict(num_layers=1, num_single_layers=0, num_attention_heads=2, attention_head_dim=12, in_channels=16,
    ...             joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 4])
    >>> spec = FluxControlNetModel.from_config(tiny)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> x, text = jnp.zeros((1, 6, 16)), jnp.zeros((1, 5, 8))
    >>> flaxdiff.apply(spec, params, x, x, text, text[:, 0], 0.5, jnp.zeros((6, 3))).controlnet_block_samples.shape
    (1, 1, 6, 24)
    """

    config_class = FluxControlNetConfig

    @classmethod
    def to_config(cls, config: FluxControlNetConfig) -> dict[str, Any]:
        """As of every model, without the setting that diffusers' class does not have."""
        return {k: v for k, v in super().to_config(config).items() if k != "out_channels"}

    def __init__(self, config: FluxControlNetConfig):
        super().__init__(config, ends=False)
        c, hint = config, config.conditioning_embedding_channels
        self.controlnet_blocks = stack(lambda: ZeroLinear(c.width, c.width), c.num_layers, c.scan_layers)
        self.controlnet_single_blocks = stack(lambda: ZeroLinear(c.width, c.width), c.num_single_layers, c.scan_layers)
        self.controlnet_mode_embedder = None if c.num_mode is None else Embedding(c.num_mode, c.width)
        self.input_hint_block = hint and ControlNetConditioningEmbedding(hint, c.conditioning_channels, (16,) * 4)
        self.controlnet_x_embedder = (Linear if hint else ZeroLinear)(c.in_channels, c.width)

    @staticmethod
    def from_transformer(spec: Spec, params: Params, key: jax.Array, **changes: Any) -> tuple[Spec, Params]:
        """A ControlNet to train, that begins as the first blocks of a transformer and adds nothing.

        Args:
          spec, params: of the transformer.
          key: a PRNG key, for what the transformer has not.
          **changes: settings of the ControlNet; by default 4 and 10 blocks.

        >>> import flaxdiff
        >>> tiny = dict(num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=12,
        ...             joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 4])
        >>> spec = flaxdiff.FluxTransformer2DModel.from_config(tiny)
        >>> params = flaxdiff.init(spec, jax.random.key(0))
        >>> ours, mine = FluxControlNetModel.from_transformer(spec, params, jax.random.key(1), num_layers=2)
        >>> bool((mine["x_embedder.weight"] == params["x_embedder.weight"]).all())
        True
        """
        shared = {f.name: getattr(spec.config, f.name) for f in dataclasses.fields(FluxConfig)}
        sizes = {"num_layers": 4, "num_single_layers": 10, "out_channels": None}
        ours = FluxControlNetModel.from_config(shared | sizes | changes)
        drawn = core.init(ours, key, params["x_embedder.bias"].dtype)
        return ours, core.continued(spec, params, ours, drawn)

    def condition(self, controlnet_cond: jax.Array) -> jax.Array:
        """What is added to the tokens: of those of the picture's latent [B, N, C]; or of a picture [B, H, W, 3]."""
        x = controlnet_cond.astype(self.dtype)
        if self.input_hint_block is not None:
            x = pack(self.input_hint_block(x), self.config.patch_size)
        return self.controlnet_x_embedder(x)

    def __call__(
        self,
        hidden_states: jax.Array,
        controlnet_cond: jax.Array,
        encoder_hidden_states: jax.Array,
        pooled_projections: jax.Array,
        timestep: jax.Array | float,
        img_ids: jax.Array,
        txt_ids: jax.Array | None = None,
        guidance: jax.Array | None = None,
        controlnet_mode: jax.Array | None = None,
        conditioning_scale: jax.Array | float = 1.0,
    ) -> FluxControlNetOutput:
        """Run the network.

        Args:
          hidden_states, encoder_hidden_states, …: as of the transformer.
          controlnet_cond: what `condition` takes; pictures in [-1, 1].
          controlnet_mode: which kind of control it is, int32 [B], for unions of several.
          conditioning_scale: of all that is added, one number, or one for each sample [B].

        Raises:
          ValueError: the kind of control is missing, or guidance is.
        """
        told = self.times(jnp.broadcast_to(timestep, (len(pooled_projections),)), pooled_projections, guidance)
        condition, scale = self.condition(controlnet_cond), jnp.broadcast_to(conditioning_scale, (len(hidden_states),))
        return self.residuals(
            hidden_states, condition, controlnet_mode, scale, encoder_hidden_states, told, img_ids, txt_ids
        )

    def residuals(
        self,
        hidden_states: jax.Array,
        condition: jax.Array,
        controlnet_mode: jax.Array | None,
        scale: jax.Array,
        encoder_hidden_states: jax.Array,
        told: Told,
        img_ids: jax.Array,
        txt_ids: jax.Array | None = None,
    ) -> FluxControlNetOutput:
        """What is added, given the picture's `condition`, a scale [B] and what `times` made of time, text, guidance."""
        told, text = self.told(told, None, None), self.context_embedder(encoder_hidden_states.astype(self.dtype))
        txt_ids = jnp.zeros((text.shape[1], img_ids.shape[-1])) if txt_ids is None else txt_ids
        if self.controlnet_mode_embedder is not None:
            if controlnet_mode is None:
                raise ValueError("This ControlNet is a union of several; give controlnet_mode, the number of one.")
            text = jnp.concatenate([self.controlnet_mode_embedder(controlnet_mode)[:, None], text], 1)
            txt_ids = jnp.concatenate([txt_ids[:1], txt_ids])
        image = constrain(self.x_embedder(hidden_states.astype(self.dtype)) + condition, "batch", "context")
        turn, texts = self.turn(img_ids, text.shape[1], txt_ids), text.shape[1]

        scaled = lambda linear, x: linear(x) * scale[:, None, None].astype(x.dtype)
        seen = states(self.transformer_blocks, (text, image), turn, each=(told.double, None, ()))
        double = over(self.controlnet_blocks, scaled, seen[1][1:])
        if not self.config.num_single_layers:
            return FluxControlNetOutput(double, None)
        x = jnp.concatenate([part[-1] for part in seen], 1)
        seen = states(self.single_transformer_blocks, x, turn, each=(told.single, None))[1:, :, texts:]
        return FluxControlNetOutput(double, over(self.controlnet_single_blocks, scaled, seen))
