"""Convolutions with half the products, for processors whose arithmetic is the limit.

Along the rows a convolution multiplies polynomials, and those are known by their values at some points. So each six
rows of pixels and a window's three are taken to their values at 0, 1, -1, 2, -2 and ∞, multiplied there, and the
products taken back to four rows of results: six products where four rows take twelve. A window of two rows does with
five points, in place of eight products. Across the columns what is multiplied is a convolution as before; of a small
picture a product of matrices, with the pixels that a window sees copied side by side.

Reference: Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast Algorithms for Convolutional
Neural Networks, 2016.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 4
POINTS = 0, 1, -1, 2, -2  # and ∞
WIDE = 64  # channels from which products take so long that sums of rows beside them do not matter
MANY = 2**9  # pixels from which they are more than the sums of the window
FEW = 2**11  # pixels up to which copying them takes less than XLA's convolution takes more than a product
NEAR = 2**25  # bytes of a picture and its result that are worked on at once
Padding = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right


def fit(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `convolved` is best on a CPU: in float32, for many pixels and channels, in rows by fours."""
    (b, h, w, _), (rows, _, *channels) = x.shape, weight.shape
    # rows of small pictures that several devices share would go to and fro between them
    many = b * h * w >= (MANY if jax.sharding.get_abstract_mesh().empty else FEW) and min(channels) >= WIDE
    return x.dtype == jnp.float32 and rows in (2, 3) and h % ROWS == 0 and many


@functools.cache
def matrices(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B, G and A of a window of so many rows: results = A · (G · window) (B · pixels).

    A has the powers of the points, G those over the product of the differences to all others, B the coefficients of the
    polynomial that is zero at the others; ∞ stands for the highest coefficient.

    >>> matrices(2)[0].astype(int)
    array([[ 2, -1, -2,  1,  0],
           [ 0, -2, -1,  1,  0],
           [ 0,  2, -3,  1,  0],
           [ 0, -1,  0,  1,  0],
           [ 0,  2, -1, -2,  1]])
    """
    points = np.array(POINTS[: ROWS + rows - 2])
    others = [np.delete(points, i) for i in range(len(points))]
    infinite = lambda powers: np.eye(powers)[-1]
    pixels = [np.append(np.poly(other)[::-1], 0) for other in others] + [np.poly(points)[::-1]]
    window = [point ** np.arange(rows) / np.prod(point - other) for point, other in zip(points, others)]
    back = [point ** np.arange(ROWS) for point in points]
    return np.array(pixels), np.array([*window, infinite(rows)]), np.array([*back, infinite(ROWS)]).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolved(x: jax.Array, weight: jax.Array, padding: Padding = ((1, 1), (1, 1))) -> jax.Array:
    """Convolve [B, H, W, in] with [2 or 3, columns, in, out] to [B, H, W, out]; H is a multiple of four.

    >>> convolved(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :2, :3, 0].round(4)
    Array([[4., 6., 6.],
           [6., 9., 9.]], dtype=float32)
    """
    b, h, w, channels = x.shape
    to_pixels, to_window, to_rows = (jnp.asarray(matrix, jnp.float32) for matrix in matrices(len(weight)))
    x, rows = _padded(x, padding[:1]), h
    across = _side_by_side if b * h * w <= FEW else _along
    while rows % (2 * ROWS) == 0 and b * rows * w * (channels + weight.shape[3]) * 4 > NEAR:
        rows //= 2

    def some(first: jax.Array | int) -> jax.Array:
        """So many rows of the result."""
        part = jax.lax.dynamic_slice_in_dim(x, first, rows + len(weight) - 1, 1)

        def add(y: jax.Array, point: Sequence[jax.Array]) -> tuple[jax.Array, None]:
            """The share of one point in the result; in a loop, since a program of so many products takes memory."""
            of_pixels, of_window, of_rows = point
            pixels = sum(c * part[:, i : i + rows : ROWS] for i, c in enumerate(of_pixels))
            product = across(pixels, sum(c * row for c, row in zip(of_window, weight)), padding[1])
            return y + of_rows[:, None, None] * product[:, :, None], None

        y = jnp.zeros((b, rows // ROWS, ROWS, w, weight.shape[3]))
        return jax.lax.scan(add, y, (to_pixels, to_window, to_rows.T))[0].reshape(b, rows, w, -1)

    y = some(0)[None] if rows == h else jax.lax.map(some, jnp.arange(0, h, rows))
    return y.swapaxes(0, 1).reshape(b, h, w, -1)


def _backward(padding: Padding, given: tuple[jax.Array, jax.Array], y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The transposed convolution is one too; the window's gradient takes the same way through the points back."""
    (x, weight), w = given, y.shape[2]
    _, g, a = matrices(len(weight))
    by_row = y.reshape(len(y), -1, ROWS, *y.shape[2:])
    results = _mixed(a.T, [by_row[:, :, i] for i in range(ROWS)])
    over = lambda pixels, result: pixels.reshape(-1, x.shape[-1]).T @ result.reshape(-1, y.shape[-1])
    rows = [
        jnp.stack([over(pixels[:, :, j : j + w], result) for j in range(weight.shape[1])])
        for pixels, result in zip(_pixels(_padded(x, padding), len(weight)), results)
    ]
    turned = tuple((after, before) for before, after in padding)
    return convolved(y, weight[::-1, ::-1].swapaxes(2, 3), turned), jnp.stack(_mixed(g.T, rows))


convolved.defvjp(lambda x, weight, padding: (convolved(x, weight, padding), (x, weight)), _backward)


def _along(pixels: jax.Array, row: jax.Array, padding: tuple[int, int]) -> jax.Array:
    """Convolve the columns with [columns, in, out]."""
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(pixels, row[None], (1, 1), ((0, 0), padding), dimension_numbers=dims)


def _side_by_side(pixels: jax.Array, row: jax.Array, padding: tuple[int, int]) -> jax.Array:
    """The same as one product."""
    w, pixels = pixels.shape[2], _padded(pixels, ((0, 0), padding))
    seen = jnp.concatenate([pixels[:, :, j : j + w] for j in range(len(row))], -1)
    return seen @ row.reshape(-1, row.shape[-1])


def _padded(x: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """With zeros around its rows, and its columns where they are said too; written once, not asked for by sums."""
    return jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, *[(0, 0)] * (3 - len(padding)))))


def _pixels(x: jax.Array, rows: int) -> list[jax.Array]:
    """The values at each point of padded rows, [B, rows / 4, W, in], for a window of so many rows."""
    b, _, _ = matrices(rows)
    last = x.shape[1] - len(b) + 1
    return _mixed(b, [x[:, i : i + last : ROWS] for i in range(len(b))])


def _mixed(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """matrix · parts, without what is multiplied by zero."""
    return [sum(float(c) * part for c, part in zip(row, parts) if c) for row in matrix]
