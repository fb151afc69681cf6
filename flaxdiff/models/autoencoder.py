"""What every autoencoder of pictures has: settings that trade time for memory, and the means to keep to them."""

import dataclasses
from collections.abc import Callable

from flaxdiff.core import Config, Model, setting
from flaxdiff.nn.tiling import Function, sliced, tiled


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Config):
    """The settings; `block_out_channels` of the configurations that derive from it says how often sizes are halved."""

    slicing: bool = setting(False)  # one picture at a time
    tiling: int | None = setting(None)  # side in pixels of the tiles that pictures are cut into

    def __post_init__(self):
        if self.tiling is not None and (self.tiling < 1 or self.tiling % (4 * self.factor)):
            raise ValueError(f"Autoencoder: tiling={self.tiling}; use a positive multiple of {4 * self.factor} pixels.")

    @property
    def factor(self) -> int:
        """Pixels to a latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Autoencoder(Model):
    """The base of autoencoders: `self.config` is theirs."""

    def in_parts(self, run: Function, pixels: int, cut: Callable[[Function, int], Function] = tiled) -> Function:
        """A function of pictures, whose points are so many pixels wide, in the parts that the settings ask for."""
        run = run if self.config.tiling is None else cut(run, self.config.tiling // pixels)
        return sliced(run) if self.config.slicing else run
