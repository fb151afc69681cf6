"""IPAdapter: what turns the embedding of a picture into tokens, and the keys and values that a U-Net makes of them.

The projection has one of five forms: a linear layer (base), a small network over all patches (full face) or over the
embedding of a face (FaceID), and a resampler in which a few learned tokens, or tokens of the face, attend to patches
(Plus, FaceID Plus). That of Stable Diffusion 3 is told the time as well, so that nothing of it stays the same from step
to step. Parameter names are those of the published files.

Reference: Ye et al., IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models, 2023.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from flaxdiff import weights
from flaxdiff.core import Config, Model, only, param
from flaxdiff.nn.activations import ACTIVATIONS
from flaxdiff.nn.attention import KeysValues, attention, split_heads
from flaxdiff.nn.embeddings import TimestepEmbedding, sinusoids
from flaxdiff.nn.joint import Seen
from flaxdiff.nn.layers import LayerNorm, Linear, RMSNorm, normal, value
from flaxdiff.nn.modulation import AdaLayerNorm, vary

HEAD = 64  # channels of a head in every published resampler


@dataclasses.dataclass(frozen=True)
class IPAdapterConfig(Config):
    """What a file's tensors say of the network; `attentions`: (channels, blocks) of each transformer in its order."""

    kind: str = only("base", "full", "faceid", "plus", "faceid_plus")
    image_dim: int = 1024  # channels of what is read: an embedding, patches, or a face
    cross_attention_dim: int = 768
    tokens: int = 4
    hidden_dim: int = 1024  # channels inside the projection
    patch_dim: int = 1280  # of the patches that a face is refined by
    heads: int = 12
    depth: int = 4
    shortcut: bool = False  # version 2 of FaceID Plus adds what the face alone gives
    attentions: tuple[tuple[int, int], ...] = ()
    bias: bool = False  # of the keys and values
    every: bool = False  # whether no other attentions, which look at no pictures, are counted in the file


class PerceiverAttention(nnx.Module):
    """Latents attend to patches and to themselves."""

    def __init__(self, width: int, heads: int):
        self.norm1, self.norm2, self.heads = LayerNorm(width), LayerNorm(width), heads
        self.to_q, self.to_kv = Linear(width, heads * HEAD, False), Linear(width, 2 * heads * HEAD, False)
        self.to_out = Linear(heads * HEAD, width, False)

    def __call__(self, x: jax.Array, latents: jax.Array, told: Sequence[jax.Array] = ()) -> jax.Array:
        """[B, N, C] and [B, T, C], shifted and scaled by what they are `told` -> [B, T, C]."""
        latents = vary(self.norm2(latents), *told) if told else self.norm2(latents)
        k, v = jnp.split(self.to_kv(jnp.concatenate([self.norm1(x), latents], 1)), 2, -1)
        split = lambda a: split_heads(a, self.heads)
        h = attention(split(self.to_q(latents)), split(k), split(v))
        return self.to_out(h.reshape(*h.shape[:2], -1))


def _sequence(layers: Sequence[nnx.Module | None], x: jax.Array) -> jax.Array:
    """Layers by their number in the file; where there is none, an activation."""
    for layer in layers:
        x = ACTIVATIONS["gelu"](x) if layer is None else layer(x)
    return x


class Resampler(nnx.Module):
    """Patches [B, N, D] -> tokens [B, T, C], by latents that attend to them; with `timed` as a time tells them to."""

    def __init__(
        self, fan_in: int, width: int, fan_out: int, heads: int, depth: int, latents: int | None, timed: bool = False
    ):
        self.latents = None if latents is None else param((1, latents, width), "raw", normal)
        self.proj_in, self.proj_out, self.norm_out = Linear(fan_in, width), Linear(width, fan_out), LayerNorm(fan_out)
        forward = lambda: nnx.List(
            [LayerNorm(width), Linear(width, 4 * width, False), None, Linear(4 * width, width, False)]
        )
        told = lambda: [nnx.List([None, Linear(width, 4 * width)])] if timed else []
        self.layers = nnx.List([nnx.List([PerceiverAttention(width, heads), forward(), *told()]) for _ in range(depth)])

    def __call__(self, x: jax.Array, latents: jax.Array | None = None, time: jax.Array | None = None) -> jax.Array:
        """The patches, latents that are not its own [B, T, D], and where it is timed the embedding of a time [B, D]."""
        x = self.proj_in(x) if time is None else self.proj_in(x) + time[:, None]
        if latents is None:
            own = value(self.latents)
            latents = jnp.broadcast_to(own, (len(x), *own.shape[1:]))
        for attend, (norm, *forward), *read in self.layers:
            of_time = [read[0][1](jax.nn.silu(time))[:, None] for _ in read]
            told = [part for parts in of_time for part in jnp.split(parts, 4, -1)]
            latents = latents + attend(x, latents, told[:2])
            h = vary(norm(latents), *told[2:]) if told else norm(latents)
            latents = latents + _sequence(forward, h)
        return self.norm_out(self.proj_out(latents))


class Projection(nnx.Module):
    """Embeddings [B, D], or patches [B, N, D] -> normalised tokens [B, T, C]."""

    def __init__(self, c: IPAdapterConfig):
        width, tokens = c.cross_attention_dim, c.tokens
        if c.kind == "base":
            self.proj, self.norm = Linear(c.image_dim, tokens * width), LayerNorm(width)
        elif c.kind == "full":
            self.proj = nnx.List(
                [Linear(c.image_dim, c.hidden_dim), None, Linear(c.hidden_dim, width), LayerNorm(width)]
            )
        else:
            self.proj = nnx.List([Linear(c.image_dim, c.hidden_dim), None, Linear(c.hidden_dim, tokens * width)])
            self.norm = LayerNorm(width)
        self.kind, self.width = c.kind, width

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.proj(x) if self.kind == "base" else _sequence(self.proj, x)
        return h if self.kind == "full" else self.norm(h.reshape(len(x), -1, self.width))


class FacePlus(nnx.Module):
    """Tokens of a face, refined by patches."""

    def __init__(self, c: IPAdapterConfig):
        width = c.cross_attention_dim
        self.proj = nnx.List([Linear(c.image_dim, c.hidden_dim), None, Linear(c.hidden_dim, c.tokens * width)])
        self.norm, self.shortcut, self.width = LayerNorm(width), c.shortcut, width
        self.perceiver_resampler = Resampler(c.patch_dim, width, width, c.heads, c.depth, None)

    def __call__(self, x: jax.Array, patches: jax.Array) -> jax.Array:
        face = self.norm(_sequence(self.proj, x).reshape(len(x), -1, self.width))
        refined = self.perceiver_resampler(patches, face)
        return face + refined if self.shortcut else refined


class TokenKeysValues(nnx.Module):
    """What one attention makes of the tokens."""

    def __init__(self, fan_in: int, width: int, bias: bool):
        self.to_k_ip, self.to_v_ip = Linear(fan_in, width, bias), Linear(fan_in, width, bias)


PROJECTIONS: Mapping[str, Callable[[IPAdapterConfig], nnx.Module]] = {
    "base": Projection,
    "full": Projection,
    "faceid": Projection,
    "plus": lambda c: Resampler(c.image_dim, c.hidden_dim, c.cross_attention_dim, c.heads, c.depth, c.tokens),
    "faceid_plus": FacePlus,
}


class IPAdapter(Model):
    """Pictures' embeddings -> the keys and values that a U-Net's attentions add.

    >>> import flaxdiff
    >>> spec = IPAdapter.from_config({"image_dim": 8, "cross_attention_dim": 16, "attentions": [[32, 2]]})
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> [(k, v)] = flaxdiff.apply(spec, params, jnp.zeros((1, 3, 8)))
    >>> k.shape  # of three pictures with four tokens each, in two blocks
    (1, 3, 2, 4, 32)
    """

    config_class = IPAdapterConfig
    library = None

    def __init__(self, config: IPAdapterConfig):
        self.image_proj = PROJECTIONS[config.kind](config)
        blocks = [width for width, depth in config.attentions for _ in range(depth)]
        pairs = [TokenKeysValues(config.cross_attention_dim, width, config.bias) for width in blocks]
        others = () if config.every else (None,)  # self-attentions have a number too
        self.ip_adapter = nnx.List([part for pair in pairs for part in (*others, pair)])
        self.config = config

    def __call__(self, embeds: jax.Array, patches: jax.Array | None = None) -> list[KeysValues]:
        """(k, v) [B, I, blocks, T, C] of each transformer in the file's order.

        Args:
          embeds: of I pictures, [B, I, D], or their patches [B, I, N, D].
          patches: [B, I, N, D], beside the embeddings of faces.
        """
        pairs = [pair for pair in self.ip_adapter if pair is not None]
        batch, dtype = embeds.shape[:2], pairs[0].to_k_ip.weight.get_value().dtype
        flat = [x.astype(dtype).reshape(-1, *x.shape[2:]) for x in (embeds, patches) if x is not None]
        tokens, pairs = self.image_proj(*flat), iter(pairs)

        def stacked(blocks: list[TokenKeysValues]) -> KeysValues:
            each = [(block.to_k_ip(tokens), block.to_v_ip(tokens)) for block in blocks]
            return tuple(a.reshape(*batch, *a.shape[1:]) for a in (jnp.stack(parts, 1) for parts in zip(*each)))

        return [stacked([next(pairs) for _ in range(depth)]) for _, depth in self.config.attentions]


@dataclasses.dataclass(frozen=True)
class SD3IPAdapterConfig(Config):
    """What a file's tensors say of the network."""

    kind: str = only("timed")
    image_dim: int = 1152  # channels of a patch
    hidden_dim: int = 1280  # inside the projection
    time_dim: int = 320  # sinusoids of a time
    heads: int = 20
    depth: int = 4
    tokens: int = 64
    width: int = 2432  # of the transformer's tokens
    head_dim: int = 64
    blocks: int = 38


class TimeResampler(Resampler):
    """Patches -> tokens, given the time."""

    def __init__(self, c: SD3IPAdapterConfig):
        super().__init__(c.image_dim, c.hidden_dim, c.width, c.heads, c.depth, c.tokens, timed=True)
        self.time_embedding = TimestepEmbedding(c.time_dim, c.hidden_dim)


class JointKeysValues(nnx.Module):
    """What one attention makes of the tokens, as the time tells it, and how it normalises what it meets them with."""

    def __init__(self, c: SD3IPAdapterConfig):
        self.norm_ip = AdaLayerNorm(c.width, 2, condition=c.hidden_dim)
        self.to_k_ip, self.to_v_ip = Linear(c.width, c.width, False), Linear(c.width, c.width, False)
        self.norm_q, self.norm_k, self.norm_ip_k = (RMSNorm(c.head_dim) for _ in range(3))
        self.head_dim = c.head_dim

    def __call__(self, tokens: jax.Array, time: jax.Array, weight: jax.Array) -> Seen:
        """[B, T, C], the embedding of the time [B, D] and how much they count [B]."""
        shift, scale = jnp.split(self.norm_ip.modulation(time), 2, -2)
        h = vary(self.norm_ip.norm(tokens), shift, scale)
        k, v = (a.reshape(*a.shape[:2], -1, self.head_dim) for a in (self.to_k_ip(h), self.to_v_ip(h)))
        return Seen(self.norm_ip_k(k), v, value(self.norm_q.weight), value(self.norm_k.weight), weight)


class SD3IPAdapter(Model):
    """A picture's patches and a time -> what the attentions of Stable Diffusion 3 add.

    >>> import flaxdiff
    >>> tiny = dict(image_dim=8, hidden_dim=64, heads=1, depth=1, tokens=3, width=16, head_dim=8, blocks=2)
    >>> spec = SD3IPAdapter.from_config(tiny)
    >>> params = flaxdiff.init(spec, jax.random.key(0))
    >>> time = flaxdiff.apply(spec, params, jnp.zeros(1), method="times")
    >>> flaxdiff.apply(spec, params, jnp.zeros((1, 5, 8)), time, jnp.ones((1, 2))).k.shape  # of two blocks
    (2, 1, 3, 2, 8)
    """

    config_class = SD3IPAdapterConfig
    library = None

    def __init__(self, config: SD3IPAdapterConfig):
        self.image_proj = TimeResampler(config)
        self.ip_adapter = nnx.List([JointKeysValues(config) for _ in range(config.blocks)])
        self.config = config

    def times(self, t: jax.Array) -> jax.Array:
        """The embedding of times [...]: [..., D]."""
        embed = self.image_proj.time_embedding
        return embed(sinusoids(t, self.config.time_dim).astype(weights.dtype(value(embed.linear_1.weight))))

    def __call__(self, patches: jax.Array, time: jax.Array, scale: jax.Array) -> Seen:
        """What each block is to see, with the blocks first.

        Args:
          patches: of a picture [B, N, D].
          time: what `times` makes of a time [B or 1, D].
          scale: how much it counts in each block [B, blocks].
        """
        time = jnp.broadcast_to(time, (len(patches), time.shape[-1]))
        tokens = self.image_proj(patches.astype(time.dtype), None, time)
        each = [block(tokens, time, scale[:, i]) for i, block in enumerate(self.ip_adapter)]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
