"""Convolutions of large pictures on a TPU, a few rows at a time.

XLA's convolution wants eight pictures side by side. It cuts a single one into pieces, fills them up, moves them there
and back, and that takes many times as long as the arithmetic. Here a kernel holds some rows of the picture and those
next to them, and multiplies each by all columns of the window at once; then the results move by a pixel, not the
picture.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flaxdiff.nn.kernels import LANES
from flaxdiff.parallel import free_axes, splits

LIMIT = 2**24  # bytes of a TPU's fast memory that a kernel gets, whatever the compiler's flags give to others
ROOM = LIMIT - 2**21  # what is counted on
SEVERAL = 8  # pictures that XLA's own convolution is good at
LARGE = 2**25  # bytes of results in float32, from which products with shifted pictures, see weights.py, want more room
Windows = Sequence[Sequence[jax.Array]]  # [k, k, in, out] for each phase of the rows, of the columns


def fit(x: jax.Array, features: int, phases: int = 1) -> bool:
    """Whether `convolved` is best: for few and large pictures, of which rows and channels are nowhere split."""
    b, h, w, c = x.shape
    over, rows = splits(x.shape, ("batch", "rest"))[:2]
    pictures = b // math.prod(free_axes()[axis] for axis in over)  # on a device
    whole = not rows and "tensor" not in free_axes()
    large = pictures < SEVERAL and pictures * h * w * max(features, LANES) * 4 >= LARGE
    full = features < LANES or features % LANES == 0  # what is filled up costs more than the kernel saves
    sizes = c % LANES == w % 16 == 0 and full and _rows(h, w, c, _some(features), phases) > 0
    return whole and large and sizes and x.dtype == jnp.bfloat16


def convolved(x: jax.Array, windows: Windows, interpret: bool = False) -> jax.Array:
    """Convolve [B, H, W, in] with a 3 x 3 window to [B, H, W, out]; or to [B, 2H, 2W, out] with 2 x 2 times 2 x 2.

    For even rows the last row of a window is at the pixel's own, for odd rows the first, and likewise with columns.

    >>> x, window = jnp.ones((1, 8, 16, 128)), jnp.ones((3, 3, 128, 128))
    >>> convolved(x, [[window]], interpret=True)[0, 0, :2, 0]
    Array([512., 768.], dtype=float32)
    """
    (b, h, w, c), phases = x.shape, len(windows)
    weight = jnp.stack(list(map(jnp.stack, windows)))  # [u, v, rows, columns, in, out]
    wanted = weight.shape[-1]
    weight = jnp.pad(weight, [(0, 0)] * 5 + [(0, -wanted % LANES)])
    taps, features = weight.shape[2], weight.shape[-1]
    some = _some(features)
    rows = _rows(h, w, c, some, phases)
    # of one row of windows, all that multiplies a pixel lies side by side
    weight = weight.reshape(*weight.shape[:5], -1, some).transpose(5, 0, 2, 4, 1, 3, 6)
    weight = weight.reshape(features // some, phases, taps, c, -1)

    row = lambda of: pl.BlockSpec((1, 1, w, c), lambda b, j, i: (b, of(i), 0, 0))
    cost = pl.CostEstimate(
        flops=2 * (phases * taps) ** 2 * b * h * w * c * features,
        bytes_accessed=x.nbytes * (features // some) * (rows + 2) // rows
        + weight.nbytes
        + b * h * w * phases**2 * features * x.dtype.itemsize,
        transcendentals=0,
    )
    run = pl.pallas_call(
        functools.partial(_block, h // rows),
        jax.ShapeDtypeStruct((b, phases * h, phases * w, features), x.dtype),
        grid=(b, features // some, h // rows),
        in_specs=[
            row(lambda i: jnp.maximum(i * rows - 1, 0)),
            pl.BlockSpec((1, rows, w, c), lambda b, j, i: (b, i, 0, 0)),
            row(lambda i: jnp.minimum(i * rows + rows, h - 1)),
            pl.BlockSpec((1, *weight.shape[1:]), lambda b, j, i: (j, 0, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, phases * rows, phases * w, some), lambda b, j, i: (b, i, 0, j)),
        scratch_shapes=[
            pltpu.VMEM((rows + 2, w, c), x.dtype),
            *[pltpu.VMEM((2 * w, LANES), jnp.float32)] * (some // LANES if phases > 1 else 0),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=LIMIT),
        cost_estimate=cost,
        interpret=interpret,
    )
    return run(x, x, x, weight)[..., :wanted]


def _some(features: int) -> int:
    """How many features are worked out at a time."""
    return 2 * LANES if features % (2 * LANES) == 0 else LANES


def _rows(h: int, w: int, c: int, some: int, phases: int) -> int:
    """How many rows there is room for, or 0: of what is read and written, twice, and of what lies between."""
    taps = 3 if phases == 1 else 2
    weight, sums = 2 * (phases * taps) ** 2 * c * some, 4 * w * some * phases * (taps + (phases > 1))
    read, written = 2 * w * c, 2 * w * some * phases**2
    room = lambda n: 2 * (weight + n * (read + written) + 2 * read) + (n + 2) * read + sums
    return next((n for n in (16, 8, 4, 2, 1) if h % n == 0 and room(n) <= ROOM), 0)


def _block(blocks: int, above, own, below, weight, out, rows, *wide) -> None:
    """[1, rows, W, in] and the rows next to them -> [1, phases · rows, phases · W, out]."""
    i, (n, w), some = pl.program_id(2), own.shape[1:3], out.shape[-1]
    phases, taps = weight.shape[1:3]
    rows[0] = jnp.where(i > 0, above[0, 0], 0)
    rows[1 : n + 1] = own[0]
    rows[n + 1] = jnp.where(i < blocks - 1, below[0, 0], 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (w, some), 0)

    def moved(a: jax.Array, by: int) -> jax.Array:
        """What the column so much further gives."""
        there = column < w - 1 if by > 0 else column > 0
        return a if by == 0 else jnp.where(there, pltpu.roll(a, -by % w, 0), 0)

    def row(r: jax.Array, _: None) -> None:
        for u in range(phases):
            dot = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32)
            parts = jnp.split(sum(dot(rows[r + u + k], weight[0, u, k]) for k in range(taps)), phases * taps, 1)
            for v in range(phases):
                y = sum(moved(parts[v * taps + t], v + t - 1) for t in range(taps))
                if phases == 1:
                    out[0, r] = y.astype(out.dtype)
                for lanes, part in zip(wide, jnp.split(y, some // LANES, 1)):
                    lanes[pl.ds(v, w, stride=2)] = part
            for m, lanes in enumerate(wide):
                out[0, 2 * r + u, :, m * LANES : (m + 1) * LANES] = lanes[...].astype(out.dtype)

    jax.lax.fori_loop(0, n, row, None)
