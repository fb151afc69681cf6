"""Which example is at which place of the endless stream that a run reads: arithmetic on (seed, place), and no state.

Examples are in groups, one for each size of picture; a batch takes its examples from one group. Each group is gone
through again and again, every time in another order, and in every pass each example comes exactly once. What a pass
leaves over when batches do not come out even opens the next batch of its group, so nothing is dropped and no batch is
short. Groups take turns by chance, in proportion to their sizes.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from flaxdiff.training.data.pictures import Size

SHUFFLE, TURNS = 1, 2  # what random numbers are for: each use has its own


def buckets(resolution: int = 1024, stride: int = 64, longest: float = 2.0) -> tuple[Size, ...]:
    """Sizes of pictures of all proportions: (height, width), of at most resolution² pixels, multiples of a stride.

    Args:
      resolution: side of the square in pixels.
      stride: what sizes are multiples of: the pixels of a token or of a latent at the network's coarsest level.
      longest: how many times as long as wide a size may be.

    Raises:
      ValueError: the resolution is no multiple of the stride.

    >>> buckets(256, 64)
    ((192, 320), (256, 256), (320, 192))
    """
    if stride < 1 or resolution < stride or resolution % stride:
        raise ValueError(f"resolution={resolution} is no multiple of stride={stride}; give one that is.")
    sides = range(stride, int(resolution * longest) + 1, stride)
    sizes = {(a, resolution**2 // a // stride * stride) for a in sides}
    sizes |= {(b, a) for a, b in sizes}
    return tuple(sorted((a, b) for a, b in sizes if b and max(a, b) <= longest * min(a, b)))


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> int:
    """Which of several sizes is closest to a picture's proportions.

    >>> nearest_bucket((300, 400), [(64, 64), (64, 96), (96, 64)])
    1
    """
    ratio = math.log(size[0] / size[1])
    return min(range(len(sizes)), key=lambda i: abs(ratio - math.log(sizes[i][0] / sizes[i][1])))


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The order of examples; see the module's paragraph.

    Attributes:
      groups: the numbers of the examples of each group, none of them empty.
      batch_size: examples in a batch.
      seed: of all orders.
      shuffle: whether passes have orders of their own; else all have that of the groups.
    """

    groups: tuple[np.ndarray, ...]
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    @functools.cached_property
    def total(self) -> int:
        """Examples in all."""
        return sum(map(len, self.groups))

    def batches(self, epoch: int) -> list[int]:
        """How many batches each group has given before an epoch: what its passes until then can fill."""
        return [epoch * len(group) // self.batch_size for group in self.groups]

    def place(self, n: int) -> tuple[int, int]:
        """Of batch n, the group, and how many batches that has given before."""
        epoch = bisect.bisect_right(
            range((n + 1) * self.batch_size * (len(self.groups) + 1)), n, key=lambda e: sum(self.batches(e))
        )
        first, turns = self._turns(epoch - 1)
        at = n - sum(first)
        group = int(turns[at])
        return group, first[group] + int((turns[:at] == group).sum())

    def example(self, group: int, place: int) -> int:
        """The number of the example at a place of a group's own stream."""
        members = self.groups[group]
        turn, at = divmod(place, len(members))
        return int(members[self._permutation(group, turn)[at] if self.shuffle else at])

    # Workers ask for batches in turn, a few at a time: what was drawn for an epoch is drawn once.

    @functools.cached_property
    def _turns(self):
        def turns(epoch: int) -> tuple[list[int], np.ndarray]:
            first, after = self.batches(epoch), self.batches(epoch + 1)
            each = np.repeat(np.arange(len(self.groups)), np.subtract(after, first))
            return first, np.random.default_rng((self.seed, TURNS, epoch)).permutation(each) if self.shuffle else each

        return functools.lru_cache(4)(turns)

    @functools.cached_property
    def _permutation(self):
        def permutation(group: int, turn: int) -> np.ndarray:
            return np.random.default_rng((self.seed, SHUFFLE, group, turn)).permutation(len(self.groups[group]))

        return functools.lru_cache(2 * len(self.groups))(permutation)

    def __getstate__(self) -> tuple:
        return self.groups, self.batch_size, self.seed, self.shuffle

    def __setstate__(self, state: tuple) -> None:
        for field, value in zip(dataclasses.fields(self), state):
            object.__setattr__(self, field.name, value)
