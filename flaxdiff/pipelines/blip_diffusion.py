"""BLIP-Diffusion: pictures of a subject that another picture shows, in new places or led by a picture of edges.

A Q-Former looks at the picture for what a word names, and what it finds is read among the tokens of the prompt. The
prompt is repeated, which amplifies it.

Reference: Li et al., BLIP-Diffusion: Pre-trained Subject Representation for Controllable Text-to-Image Generation and
Editing, 2023.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flaxdiff import images as pictures
from flaxdiff.adapters import control
from flaxdiff.pipelines import stable_diffusion as sd
from flaxdiff.pipelines.generate import Cond, Inputs, Networks, Size
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.pipelines.text import Tokenizer, branches, check_prompts, texts

WORDS = "google-bert/bert-base-uncased"  # whose tokens the Q-Former reads where its configuration does not say


def prepare(
    pipe: DiffusionPipeline,
    size: Size,
    guided: bool,
    prompt: str | Sequence[str] | None = None,
    reference_image: Any = None,
    source_subject_category: str | Sequence[str] | None = None,
    target_subject_category: str | Sequence[str] | None = None,
    neg_prompt: str | Sequence[str] = "",
    prompt_strength: float = 1.0,
    prompt_reps: int = 20,
) -> dict[str, Any]:
    """The prompts and the subjects as tokens, and the picture as the Q-Former reads it.

    Args:
      prompt: what is to be seen of the subject, as in "swimming underwater"; one text or several.
      reference_image: what shows the subject: Pillow pictures or arrays [B, H, W, 3] in [0, 1].
      source_subject_category: what to look for in it, as in "dog".
      target_subject_category: what to draw, which may be something else that is to look like it.
      neg_prompt: what to avoid.
      prompt_strength, prompt_reps: the prompt is repeated so often as their product says.

    Raises:
      ValueError: one of them is missing, or they do not go together.
    """
    given = {"source_subject_category": source_subject_category, "target_subject_category": target_subject_category}
    if absent := [k for k, v in {"reference_image": reference_image, **given}.items() if v is None]:
        raise ValueError(f"{type(pipe).__name__} draws a subject that a picture shows; give {'=, '.join(absent)}=.")
    prompts = texts(check_prompts(pipe, prompt, None))
    subjects = {name: texts(words) for name, words in given.items()}
    for name, words in subjects.items():
        if len(words) not in (1, len(prompts)):
            raise ValueError(f"{name} has {len(words)} entries for {len(prompts)} prompts; give one, or one for each.")
    targets = np.broadcast_to(subjects["target_subject_category"], len(prompts))
    repeated = int(prompt_strength * prompt_reps)
    told = [", ".join([f"a {target} {text.strip()}"] * repeated) for target, text in zip(targets, prompts)]
    c, vision = pipe.qformer.config, pipe.qformer.config.vision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the end of the repetitions is not read
        ids = pipe.tokenizer(told, pipe.text_encoder.config.max_position_embeddings - c.num_query_tokens)
    settings = {k: dict(pipe.settings).get(k) for k in ("mean", "std", "ctx_begin_pos")}
    normalised = settings["mean"] or pictures.CLIP_MEAN, settings["std"] or pictures.CLIP_STD
    tokenizer = Tokenizer(c.tokenizer or WORDS, "BertTokenizer")
    arrays = {
        "prompt_ids": ids,
        "context_begin": np.int32(2 if settings["ctx_begin_pos"] is None else settings["ctx_begin_pos"]),
        "subject_ids": subject_ids(tokenizer, subjects["source_subject_category"]),
        "image_pixels": pictures.square_pixels(reference_image, vision.image_size, *normalised),
    }
    return arrays | ({"negative_prompt_ids": pipe.tokenizer(texts(neg_prompt))} if guided else {})


def subject_ids(tokenizer: Tokenizer, words: Sequence[str]) -> np.ndarray:
    """Names of subjects as tokens, int32 [B, N], N a multiple of eight so that few programs serve all of them."""
    longest = max(map(len, tokenizer.loaded(list(words))["input_ids"]))
    return tokenizer(words, -(-longest // 8) * 8)


def encode(networks: Networks, inputs: Inputs) -> Mapping[str, Cond]:
    """The text of each branch, among the positive one's what was found of the subject."""
    ids, pad = inputs["subject_ids"], networks.config("qformer").qformer.pad_token_id
    subject = networks("qformer", ids, ids != pad, inputs["image_pixels"])
    cond = {}
    for branch, prefix in branches(inputs).items():
        inserted = () if prefix else (subject, inputs["context_begin"])
        text = networks("text_encoder", inputs[f"{prefix}prompt_ids"], *inserted).last_hidden_state
        cond[branch] = sd.attended(networks, inputs, branch, text)
    return cond


def led(
    pipe: DiffusionPipeline, size: Size, guided: bool, condtioning_image: Any = None, control_image: Any = None
) -> dict[str, Any]:
    """What the ControlNet sees.

    Args:
      condtioning_image: the picture to follow, as diffusers spells it: Pillow's, or arrays [B, H, W, 3] in [0, 1].
      control_image: the same, as others call it.
    """
    condtioning_image = control_image if condtioning_image is None else condtioning_image
    if condtioning_image is None:
        raise ValueError(f"{type(pipe).__name__} follows a picture; give condtioning_image=.")
    if isinstance(condtioning_image, Image.Image):
        condtioning_image = condtioning_image.resize((size.width, size.height), Image.Resampling.BICUBIC)
    return control.prepare_controlnets(pipe, size, guided, condtioning_image)


class BlipDiffusionPipeline(DiffusionPipeline):
    """Pictures of a subject that another picture shows."""

    family = sd.STABLE_DIFFUSION._replace(prepare=prepare, encode=encode)
    processor = "image_processor"


class BlipDiffusionControlNetPipeline(BlipDiffusionPipeline):
    """Pictures of a subject that another picture shows, led by `condtioning_image` through a ControlNet."""

    extras = (led,)
    steers = {"controlnet": "ControlNetModel"}
