"""A network on large pictures in little memory: one picture of a batch at a time, or one tile of a picture.

Both take the function that encodes or decodes, so they serve every autoencoder, and are pure: `jit`, `vmap` and `grad`
go through them. Tiles overlap by a quarter of their side and fade into one another there. A network whose normalisation
or attention sees the whole picture sees only a tile so; the result is near to that in one piece, not equal to it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Function = Callable[[jax.Array], jax.Array]  # [B, H, W, C] -> [B, f H, f W, D] with one factor f for all sizes


def sliced(function: Function) -> Function:
    """The function of one picture after the other.

    >>> sliced(jnp.sin)(jnp.ones((3, 4, 4, 1))).shape
    (3, 4, 4, 1)
    """
    return lambda x: jax.lax.map(lambda picture: function(picture[None])[0], x)


def tiled(function: Function, side: int) -> Function:
    """The function of tiles, blended linearly where they overlap, as diffusers cuts and blends them.

    Args:
      function: what to do with a tile.
      side: of a tile, in pixels of the function's input; a picture no larger stays whole. Tiles at the right and the
        bottom are as small as what is left.

    Raises:
      ValueError: a quarter of the side is not a whole number.

    >>> tiled(lambda x: x, 8)(jnp.ones((1, 20, 13, 1))).shape
    (1, 20, 13, 1)
    """
    step = side - side // 4
    if side < 4 or side % 4:
        raise ValueError(f"Tiles of side {side} do not overlap by a quarter; use a positive multiple of 4.")

    def run(x: jax.Array) -> jax.Array:
        if max(x.shape[1:3]) <= side:
            return function(x)
        tiles = _tiles(function, x, side, step)
        rows, columns = (range(0, n, step) for n in x.shape[1:3])
        out = tiles[0, 0].shape[1] * step // min(side, x.shape[1])  # a step in what the function makes
        return _blended([[tiles[top, left] for left in columns] for top in rows], out)

    return run


def overlaid(function: Function, side: int) -> Function:
    """The function of tiles, each laid over those before it, as `AutoencoderTiny` of diffusers does.

    They overlap by an eighth of their side, and a tile's weight grows there from 0 to 1 along either axis.

    >>> overlaid(lambda x: x, 8)(jnp.ones((1, 20, 13, 1))).shape
    (1, 20, 13, 1)
    """
    overlap = side // 8

    def run(x: jax.Array) -> jax.Array:
        tiles = _tiles(function, x, side, side - overlap)
        made, given = tiles[0, 0].shape, min(side, x.shape[1])
        scaled = lambda n: n * made[1] // given
        ramp = lambda n: jnp.clip(jnp.arange(n) / max(scaled(overlap) - 1, 1), 0, 1)
        out = jnp.zeros((made[0], scaled(x.shape[1]), scaled(x.shape[2]), made[3]), tiles[0, 0].dtype)
        for top, left in sorted(tiles):
            tile = tiles[top, left]
            (h, w), at = tile.shape[1:3], (0, scaled(top), scaled(left), 0)
            down, across = ramp(h) if top else jnp.ones(h), ramp(w) if left else jnp.ones(w)
            weight = jnp.outer(down, across)[..., None].astype(tile.dtype)
            below = jax.lax.dynamic_slice(out, at, tile.shape)
            out = jax.lax.dynamic_update_slice(out, weight * tile + (1 - weight) * below, at)
        return out

    return run


def _tiles(function: Function, x: jax.Array, side: int, step: int) -> dict[tuple[int, int], jax.Array]:
    """What the function makes of each tile, by the tile's corner; tiles of one size are one program."""
    rows, columns = (range(0, n, step) for n in x.shape[1:3])
    tiles = {}
    for height, tops in _by_size(rows, x.shape[1], side).items():
        for width, lefts in _by_size(columns, x.shape[2], side).items():
            corners = [(top, left) for top in tops for left in lefts]
            size = (x.shape[0], height, width, x.shape[3])
            cut = lambda at, size=size: jax.lax.dynamic_slice(x, (0, at[0], at[1], 0), size)
            tiles |= zip(corners, jax.lax.map(lambda at, cut=cut: function(cut(at)), jnp.array(corners)))
    return tiles


def _by_size(starts: Sequence[int], length: int, side: int) -> dict[int, list[int]]:
    """Where tiles begin along an axis, by how much of a tile there is."""
    sizes: dict[int, list[int]] = {}
    for start in starts:
        sizes.setdefault(min(side, length - start), []).append(start)
    return sizes


def _blended(tiles: list[list[jax.Array]], step: int) -> jax.Array:
    """Rows of tiles as one picture, each tile blended with what the tiles above and to the left reach beyond `step`."""
    # diffusers blends in place: what fades out downwards was blended with its left neighbour before, and the blend of
    # the two is blended with the left again. So its weight is the square of the ramp.
    strips, fading = [], []
    for row in tiles:
        kept, beyond = zip(*(jnp.split(tile, [min(step, tile.shape[2])], 2) for tile in row))
        strips.append(_joined(kept, beyond, 2)[:, :step])
        fading.append(_joined(kept, beyond, 2, power=2)[:, step:])
    return _joined(strips, fading, 1)


def _joined(parts: Sequence[jax.Array], beyond: Sequence[jax.Array], axis: int, power: int = 1) -> jax.Array:
    """Parts side by side; the first places of each fade in from what the one before reaches beyond its own."""
    out = [parts[0]]
    for before, part in zip(beyond, parts[1:]):
        n = before.shape[axis]
        ramp = (jnp.arange(n, dtype=part.dtype) / max(n, 1)) ** power
        ramp = ramp.reshape(-1, *[1] * (part.ndim - axis - 1))
        first, rest = jnp.split(part, [n], axis)
        out += [before * (1 - ramp) + first * ramp, rest]
    return jnp.concatenate(out, axis)
