"""3 x 3 convolutions with half the products, for processors whose arithmetic is the limit.

Along the rows a convolution multiplies polynomials, and those are known by their values at some points. So each six
rows of pixels and the three rows of the window are taken to their values at 0, 1, -1, 2, -2 and ∞, multiplied there,
and the products taken back to four rows of results: six products where four rows take twelve. Across the columns
what is multiplied is a convolution as before.

Reference: Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast Algorithms for Convolutional
Neural Networks, 2016.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 4
WIDE = 64  # channels from which products take so long that sums of rows beside them do not matter
MANY = 2**11  # pixels from which they are more than the sums of the window
NEAR = 2**25  # bytes of a picture and its result that are worked on at once
# results = BACK · (WINDOW · window) (PIXELS · pixels), at the points in this order
PIXELS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
WINDOW = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
BACK = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def fit(x: jax.Array, features: int) -> bool:
    """Whether `convolved` is best on a CPU: in float32, for many pixels and channels, in rows by fours."""
    b, h, w, channels = x.shape
    return x.dtype == jnp.float32 and h % ROWS == 0 and b * h * w >= MANY and min(channels, features) >= WIDE


@jax.custom_vjp
def convolved(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Convolve [B, H, W, in] with [3, 3, in, out] to [B, H, W, out], zeros around; H is a multiple of four.

    >>> convolved(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :2, :3, 0].round(4)
    Array([[4., 6., 6.],
           [6., 9., 9.]], dtype=float32)
    """
    b, h, w, channels = x.shape
    window, x, rows = _mixed(WINDOW, weight), _padded(x), h
    while rows % (2 * ROWS) == 0 and b * rows * w * (channels + weight.shape[3]) * 4 > NEAR:
        rows //= 2

    def some(first: jax.Array | int) -> jax.Array:
        """So many rows of the result."""
        products = [
            jax.lax.conv_general_dilated(
                pixels, row[None], (1, 1), ((0, 0), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            for pixels, row in zip(_pixels(jax.lax.dynamic_slice_in_dim(x, first, rows + 2, 1)), window)
        ]
        return jnp.stack(_mixed(BACK, products), 2).reshape(b, rows, w, -1)

    y = some(0)[None] if rows == h else jax.lax.map(some, jnp.arange(0, h, rows))
    return y.swapaxes(0, 1).reshape(b, h, w, -1)


def _backward(given: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The transposed convolution is one too; the window's gradient takes the same way through the points back."""
    (x, weight), w = given, g.shape[2]
    by_row = g.reshape(len(g), -1, ROWS, *g.shape[2:])
    results = _mixed(BACK.T, [by_row[:, :, i] for i in range(ROWS)])
    over = lambda pixels, result: pixels.reshape(-1, x.shape[-1]).T @ result.reshape(-1, g.shape[-1])
    rows = [
        jnp.stack([over(pixels[:, :, j : j + w], result) for j in range(3)])
        for pixels, result in zip(_pixels(_padded(x, columns=1)), results)
    ]
    return convolved(g, weight[::-1, ::-1].swapaxes(2, 3)), jnp.stack(_mixed(WINDOW.T, rows))


convolved.defvjp(lambda x, weight: (convolved(x, weight), (x, weight)), _backward)


def _padded(x: jax.Array, columns: int = 0) -> jax.Array:
    """With a row of zeros above and below, and so many columns on both sides; written once, not asked for by sums."""
    return jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (columns, columns), (0, 0))))


def _pixels(x: jax.Array) -> list[jax.Array]:
    """The values at each point of padded rows, [B, rows / 4, W, in]."""
    last = x.shape[1] - len(PIXELS) + 1
    return _mixed(PIXELS, [x[:, i : i + last : ROWS] for i in range(len(PIXELS))])


def _mixed(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """matrix · parts, without what is multiplied by zero."""
    return [sum(float(c) * part for c, part in zip(row, parts) if c) for row in matrix]
