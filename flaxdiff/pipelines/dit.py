"""DiT: pictures of a class, from a transformer over the latents of Stable Diffusion's autoencoder.

Reference: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.unconditional import class_ids


def prepare(
    pipe: "DiTPipeline", size: Size, guided: bool, class_labels: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """Which class each picture is of, and with guidance what is none.

    Args:
      class_labels: whole numbers, one for each picture; `get_label_ids` knows those of words.
    """
    count = pipe.transformer.config.num_embeds_ada_norm
    arrays = {"class_labels": class_ids(pipe, class_labels, count)}
    return arrays | ({"negative_class_labels": np.full(1, count, np.int32)} if guided else {})


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The class of the negative branch; that of the positive one every branch is told, see `beside.py`."""
    negative = {"class_labels": inputs[key]} if (key := "negative_class_labels") in inputs else None
    return {"positive": {}} | ({} if negative is None else {"negative": negative})


def predict(networks: Networks, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
    """The noise; that the transformer also predicts its variance is of no use to the solvers."""
    output, channels = networks("transformer", x, t, cond["class_labels"]), x.shape[-1]
    return output[..., :channels] if output.shape[-1] // 2 == channels else output


class DiTPipeline(DiffusionPipeline):
    """Pictures of classes: `class_labels` are their numbers.

    >>> import flaxdiff
    >>> transformer = flaxdiff.DiTTransformer2DModel.from_config({"out_channels": 8})
    >>> specs = ("transformer", transformer), ("vae", flaxdiff.AutoencoderKL.from_config({}))
    >>> pipe = DiTPipeline(specs, flaxdiff.DDIMScheduler(), settings=(("id2label", {"2": "white shark, man-eater"}),))
    >>> pipe.prepare_inputs(class_labels=pipe.get_label_ids(["white shark"]))["class_labels"]
    array([2], dtype=int32)
    """

    family = sd.STABLE_DIFFUSION._replace(
        prepare=prepare, encode=encode, predict=predict, times=None, distilled=None, loop="transformer"
    )
    formerly = {"Transformer2DModel": "DiTTransformer2DModel"}
    defaults = {"num_inference_steps": 50, "guidance_scale": 4.0}

    @property
    def labels(self) -> dict[str, int]:
        """The words that the checkpoint has for its classes, and their numbers."""
        named = dict(dict(self.settings).get("id2label") or ())
        return dict(sorted((word.strip(), int(i)) for i, words in named.items() for word in words.split(",")))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The numbers of words. Raises ValueError for one that the checkpoint does not have, and says what is near."""
        words, known = [label] if isinstance(label, str) else list(label), self.labels
        for word in words:
            if word not in known:
                near = difflib.get_close_matches(word, known, 3)
                hint = f"did you mean {' or '.join(near)}?" if near else "labels has all of them."
                raise ValueError(f"There is no class {word!r} among the {len(known)} words of this checkpoint; {hint}")
        return [known[word] for word in words]
