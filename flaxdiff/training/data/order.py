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


# the proportions of pictures, width to height
RATIOS = ((1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1))


def generate_aspect_ratio_buckets(resolution: int, divisibility: int = 16) -> tuple[Size, ...]:
    """Sizes of pictures of several proportions: (height, width), of about resolution² pixels.

    Args:
      resolution: side of the square in pixels.
      divisibility: what heights and widths are multiples of: the pixels to a token or a latent of the model.

    Raises:
      ValueError: a number that is not positive.

    >>> generate_aspect_ratio_buckets(64, 16)[:4]
    ((64, 64), (80, 48), (48, 80), (96, 48))
    """
    if resolution < 1 or divisibility < 1:
        raise ValueError(f"resolution={resolution} and divisibility={divisibility} must be positive; give pixels.")
    near = lambda side: max(round(side / divisibility), 1) * divisibility
    sizes = ((resolution * math.sqrt(h / w), resolution * math.sqrt(w / h)) for w, h in RATIOS)
    return tuple(dict.fromkeys((near(height), near(width)) for height, width in sizes))


def find_nearest_bucket(size: Size, sizes: Sequence[Size]) -> int:
    """Which of several sizes is closest to a picture's proportions.

    >>> find_nearest_bucket((300, 400), [(64, 64), (64, 96), (96, 64)])
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

    def example(self, group: int, place: int, further: int = 0) -> int:
        """The number of the example at a place of a group's own stream; or so much further in the pass, in a circle."""
        members = self.groups[group]
        turn, at = divmod(place, len(members))
        at = (at + further) % len(members)
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
