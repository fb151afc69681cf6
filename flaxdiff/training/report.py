"""What a run tells of itself: to the terminal, to a file of JSON lines, to TensorBoard or to Weights & Biases.

A writer is a function of a `Moment`. Figures are numbers, validation pictures are Pillow's.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from flaxdiff.planning.chips import peak_flops


class Moment(NamedTuple):
    """Where a run is, and what there is to say.

    Attributes:
      step: updates so far.
      steps: of the whole run.
      found: figures, and pictures, by name.
    """

    step: int
    steps: int
    found: Mapping[str, Any]

    @property
    def figures(self) -> dict[str, float]:
        return {name: value for name, value in self.found.items() if not isinstance(value, Image.Image)}

    @property
    def pictures(self) -> dict[str, Image.Image]:
        return {name: value for name, value in self.found.items() if isinstance(value, Image.Image)}


Writer = Callable[[Moment], None]


def line(moment: Moment) -> None:
    """A line on the terminal."""
    told = "  ".join(f"{name} {value:.4g}" for name, value in moment.figures.items())
    if told:
        print(f"step {moment.step}/{moment.steps}  {told}", flush=True)


def bar(unit: str = "step") -> Writer:
    """A progress bar with the last figures behind it, on the terminal; lines where there is none."""
    if not sys.stderr.isatty():
        return line
    from tqdm.auto import tqdm

    shown: list[tqdm] = []

    def write(moment: Moment) -> None:
        if not shown:
            shown.append(tqdm(total=moment.steps, initial=moment.step, unit=unit, dynamic_ncols=True))
        shown[0].set_postfix({name: f"{value:.4g}" for name, value in moment.figures.items()}, refresh=False)
        shown[0].update(moment.step - shown[0].n)
        if moment.step >= moment.steps:
            shown.pop().close()

    return write


def jsonl(path: str | Path) -> Writer:
    """A line of JSON for each moment, added to a file; pictures as files beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(moment: Moment) -> None:
        for name, picture in moment.pictures.items():
            picture.save(path.with_name(f"{name}_{moment.step:07}.png"))
        if moment.figures:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": moment.step, **moment.figures}) + "\n")

    return write


def tensorboard(folder: str | Path) -> Writer:
    """Scalars and pictures for TensorBoard, which reads the folder.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'TensorBoard needs tensorboardX; install it with pip install ".[train]" in the checkout.'
        ) from error
    events = SummaryWriter(str(folder), flush_secs=1)  # its thread writes; `flush` does not wait for that

    def write(moment: Moment) -> None:
        for name, value in moment.figures.items():
            events.add_scalar(name, value, moment.step)
        for name, picture in moment.pictures.items():
            events.add_image(name, np.asarray(picture), moment.step, dataformats="HWC")

    return write


def wandb(project: str, **options: Any) -> Writer:
    """Figures and pictures for Weights & Biases; `options` are those of `wandb.init`.

    Raises:
      ImportError: wandb is not installed.
    """
    try:
        import wandb as service
    except ImportError as error:
        raise ImportError("Weights & Biases needs its package; install it with `pip install wandb`.") from error
    run = service.init(project=project, **options)
    return lambda moment: run.log(
        moment.figures | {name: service.Image(picture) for name, picture in moment.pictures.items()}, step=moment.step
    )


class Stopwatch:
    """How fast a run is: steps a second, and where the work of a step is known, examples and FLOP/s."""

    def __init__(self, step: int, examples: int | None = None):
        self.step, self.since, self.examples, self.flops = step, time.perf_counter(), examples, 0.0

    def lap(self, step: int) -> dict[str, float]:
        """Figures of the steps since the last lap."""
        now = time.perf_counter()
        speed = (step - self.step) / max(now - self.since, 1e-9)
        self.step, self.since = step, now
        found = {"steps/s": speed}
        if self.examples:
            found["images/s"] = speed * self.examples
        if self.flops:
            peak = peak_flops(jax.devices())
            found |= {"mfu": speed * self.flops / peak} if peak else {"TFLOP/s": speed * self.flops / 1e12}
        return found


def flops(function: Callable, *args: Any) -> float:
    """FLOPs of the matrix products and convolutions of a function, on all devices together; what loops run counts as
    often as it is run, of branches the first.

    >>> import jax.numpy as jnp
    >>> flops(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0], jnp.ones((4, 4)))
    384.0
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, size = eqn.primitive.name, math.prod(getattr(eqn.outvars[0].aval, "shape", ())) if eqn.outvars else 0
        if name == "dot_general":
            (inner, _), _ = eqn.params["dimension_numbers"]
            total += 2.0 * size * math.prod(eqn.invars[0].aval.shape[axis] for axis in inner)
        elif name == "conv_general_dilated":
            kernel, out = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * size * math.prod(kernel) / kernel[out]
        inside = [getattr(a, "jaxpr", a) for a in jax.tree.leaves(eqn.params, is_leaf=lambda a: hasattr(a, "eqns"))]
        inside = [a for a in inside if hasattr(a, "eqns")]
        total += eqn.params.get("length", 1) * sum(map(_flops, inside[:1] if name == "cond" else inside))
    return total
