"""SD3ControlNetModel: blocks of Stable Diffusion 3's transformer that read a picture as well, and what they add to it.

The latent of the picture, and what lies beside it, are read in patches and added to the sample's tokens. Some nets, for
3.5 large, read no text: their blocks know the picture's tokens alone, and these come from the transformer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flaxdiff import core
from flaxdiff.core import Params, Spec, only
from flaxdiff.models.controlnet_flux import ZeroLinear
from flaxdiff.models.transformer_sd3 import SD3Blocks, SD3Config, Told
from flaxdiff.nn.patches import PatchEmbed
from flaxdiff.nn.stack import over, stack, states
from flaxdiff.parallel import constrain


@dataclasses.dataclass(frozen=True)
class SD3ControlNetConfig(SD3Config):
    """diffusers' keys and defaults."""

    extra_conditioning_channels: int = 0
    pos_embed_type: str | None = only("sincos", None)
    use_pos_embed: bool = True
    force_zeros_for_pooled_projection: bool = True

    @property
    def conditioning_channels(self) -> int:
        """Channels of the picture."""
        return 3


class SD3ControlNetModel(SD3Blocks):
    """What a picture adds to the blocks of Stable Diffusion 3's transformer.

    >>> import flaxdiff
    >>> tiny = dict(num_layers=2, num_attention_heads=2, attention_head_dim=12, caption_projection_dim=24,
    ...             joint_attention_dim=8, pooled_projection_dim=8, sample_size=8, pos_embed_max_size=6)
    >>> spec = SD3ControlNetModel.from_config(tiny)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> x, text = jnp.zeros((1, 8, 8, 16)), jnp.zeros((1, 5, 8))
    >>> flaxdiff.apply(spec, params, x, x, text, text[:, 0], 500.0).shape
    (2, 1, 16, 24)
    """

    config_class = SD3ControlNetConfig

    def __init__(self, config: SD3ControlNetConfig):
        c, seen = config, config.in_channels + config.extra_conditioning_channels
        super().__init__(c, (True,) * c.num_layers)
        if not c.use_pos_embed:
            self.pos_embed = None
        elif c.pos_embed_type is None:
            self.pos_embed = PatchEmbed(c.in_channels, c.width, c.patch_size, None)
        self.controlnet_blocks = stack(lambda: ZeroLinear(c.width, c.width), c.num_layers, c.scan_layers)
        self.pos_embed_input = PatchEmbed(seen, c.width, c.patch_size, None)

    @staticmethod
    def from_transformer(spec: Spec, params: Params, key: jax.Array, **changes: Any) -> tuple[Spec, Params]:
        """A ControlNet to train, that begins as the first blocks of a transformer and adds nothing.

        It reads the pooled state of the text, and latents that are shifted.

        Args:
          spec, params: of the transformer.
          key: a PRNG key, for what the transformer has not.
          **changes: settings of the ControlNet; by default 12 blocks.

        >>> import flaxdiff
        >>> tiny = dict(num_layers=3, num_attention_heads=2, attention_head_dim=12, caption_projection_dim=24,
        ...             joint_attention_dim=8, pooled_projection_dim=8, sample_size=8, pos_embed_max_size=6)
        >>> spec = flaxdiff.SD3Transformer2DModel.from_config(tiny)
        >>> params = flaxdiff.init(spec, jax.random.key(0))
        >>> ours, mine = SD3ControlNetModel.from_transformer(spec, params, jax.random.key(1), num_layers=2)
        >>> bool((mine["context_embedder.weight"] == params["context_embedder.weight"]).all())
        True
        """
        shared = {f.name: getattr(spec.config, f.name) for f in dataclasses.fields(SD3Config)}
        usual = {"num_layers": 12, "force_zeros_for_pooled_projection": False}
        ours = SD3ControlNetModel.from_config(shared | usual | changes)
        drawn = core.init(ours, key, params["context_embedder.bias"].dtype)
        zero = {name: jnp.zeros_like(new) for name, new in drawn.items() if name.startswith("pos_embed_input")}
        return ours, core.continued(spec, params, ours, drawn) | zero

    def condition(self, controlnet_cond: jax.Array) -> jax.Array:
        """What is added to the sample's tokens: of the picture's latent and what is beside it [B, h, w, C]."""
        return self.pos_embed_input(controlnet_cond)

    def times(self, timestep: jax.Array, pooled_projections: jax.Array) -> Told:
        """What times [B], or [N, 1] for N steps at once, and pooled texts [B, P] say to the blocks."""
        return Told(self.told(self.time_text_embed(timestep, pooled_projections)), None)

    def __call__(
        self,
        hidden_states: jax.Array,
        controlnet_cond: jax.Array,
        encoder_hidden_states: jax.Array | None,
        pooled_projections: jax.Array,
        timestep: jax.Array | float,
        conditioning_scale: jax.Array | float = 1.0,
    ) -> jax.Array:
        """Run the network.

        Args:
          hidden_states: noisy latents [B, h, w, C]; or, without `use_pos_embed`, the transformer's tokens [B, N, D].
          controlnet_cond: as of `condition`.
          encoder_hidden_states: the text [B, M, E]; None to nets that read none.
          pooled_projections, timestep: as of the transformer.
          conditioning_scale: of all that is added, one number, or one for each sample [B].

        Returns:
          What is added behind the blocks, [K, B, N, D].
        """
        told = self.times(jnp.broadcast_to(timestep, (len(hidden_states),)), pooled_projections)
        scale = jnp.broadcast_to(conditioning_scale, (len(hidden_states),))
        return self.residuals(hidden_states, encoder_hidden_states, told, self.condition(controlnet_cond), scale)

    def residuals(
        self, hidden_states: jax.Array, text: jax.Array | None, told: Told, condition: jax.Array, scale: jax.Array
    ) -> jax.Array:
        """What is added, given the picture's `condition`, a scale [B] and what `times` made of time and text."""
        image = self.pos_embed(hidden_states) if self.pos_embed is not None else hidden_states.astype(self.dtype)
        text = None if self.context_embedder is None else self.context_embedder(text.astype(self.dtype))
        x, seen = (text, constrain(image + condition, "batch", "context")), []
        for blocks, of_run in zip(self.transformer_blocks, told.runs, strict=True):
            each = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), of_run), {}, None, ()
            after = states(blocks, x, each=each)
            seen.append(after[1][1:])
            x = jax.tree.map(lambda a: a[-1], after)
        scaled = lambda linear, x: linear(x) * scale[:, None, None].astype(x.dtype)
        return over(self.controlnet_blocks, scaled, jnp.concatenate(seen))
