"""What a run is: frozen records of a few fields each, with the names that diffusers' training scripts give their flags.

A file of `configs/` is Python that sets `config`; every field is a flag of the command as well:

    flaxdiff train configs/lora_sdxl.py --learning-rate 1e-4 --output runs/mine
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import runpy
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Words = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from.

    Attributes:
      train_data: folder, tar or parquet files, array records, "tfds:" and a name, or a name on the Hub: see
        data/sources.py; "emoji" is what the shipped model learned from.
      dataset_config_name: which configuration of a name on the Hub.
      split: which part.
      streaming: read a name on the Hub from its beginning on.
      image_column: of the pictures.
      caption_column: of the texts.
      rejected_image_column: of the pictures that are liked less.
      conditioning_image_column: of the pictures that a ControlNet follows, or that are to be changed.
      resolution: height and width of the pictures, in pixels.
      center_crop: cut out the middle, not some part.
      random_flip: every other picture left to right.
      image_interpolation_mode: how pictures are resized.
      aspect_ratio_buckets: batches of several proportions, with as many pixels.
      proportion_empty_prompts: share of the texts that are left out, for guidance.
      max_train_samples: use so many.
      dataloader_num_workers: processes that make batches; 0 for a thread.
      instance_prompt: the text of every picture, in place of a column.
      class_data: folder with pictures of the class; what is missing there is drawn before.
      class_prompt: their text.
      num_class_images: how many there are to be.
    """

    train_data: str | None = None
    dataset_config_name: str | None = None
    split: str = "train"
    streaming: bool = False
    image_column: str = "image"
    caption_column: str = "text"
    rejected_image_column: str = "rejected"
    conditioning_image_column: str = "conditioning_image"
    resolution: int = 512
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"
    aspect_ratio_buckets: bool = False
    proportion_empty_prompts: float = 0.0
    max_train_samples: int | None = None
    dataloader_num_workers: int = 0
    instance_prompt: str | None = None
    class_data: str | None = None
    class_prompt: str | None = None
    num_class_images: int = 100


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained, and from where it starts.

    Attributes:
      pretrained_model_name_or_path: folder or Hub repository in diffusers' layout; the shipped text-to-emoji model if
        left out.
      revision: of a Hub repository.
      variant: of the weights' files, e.g. fp16.
      pretrained_vae_model_name_or_path: another autoencoder.
      controlnet_model_name_or_path: a ControlNet to go on with; a new one begins as the denoiser.
      component: a JSON file with the configuration of a network that is trained from nothing.
      trainable: regex of the parameters that move, whole paths; by default as the recipe says.
    """

    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    pretrained_vae_model_name_or_path: str | None = None
    controlnet_model_name_or_path: str | None = None
    component: str | None = None
    trainable: str | None = None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Low-rank updates, and words to learn.

    Attributes:
      rank: of each update.
      lora_alpha: an update counts lora_alpha / rank; by default once.
      use_dora: train the magnitude of each output apart from its direction (DoRA).
      target_modules: regex of the modules, whole names with the component in front; by default the denoiser's
        attentions.
      train_text_encoder: whether the text encoders move too.
      placeholder_token: the word to learn.
      initializer_token: a word that it begins as.
      num_vectors: of the word.
      learnable_property: "object" or "style".
      freeze_model: of Custom Diffusion, "crossattn_kv" or "crossattn".
    """

    rank: int = 4
    lora_alpha: float | None = None
    use_dora: bool = False
    target_modules: str | None = None
    train_text_encoder: bool = False
    placeholder_token: str | None = None
    initializer_token: str | None = None
    num_vectors: int = 1
    learnable_property: str = "object"
    freeze_model: str = "crossattn_kv"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
      prediction_type: what the network is to predict; by default what the scheduler says.
      snr_gamma: of Min-SNR weighting, 5 in its paper; none if left out.
      weighting: what each level counts: "none", "min_snr", "soft_min_snr", "p2" or "debiased".
      noise_offset: noise that is the same at all places of a channel.
      input_perturbation: further noise that the target does not know.
      dream_detail_preservation: p of DREAM, by which a network learns from its own error; none if left out.
      weighting_scheme: how times are drawn, and weighed: "stratified", "none", "logit_normal", "mode", "cubic",
        "sigma_sqrt" or "cosmap".
      logit_mean, logit_std: of "logit_normal".
      mode_scale: of "mode".
      timestep_bias_strategy: "none", "earlier", "later" or "range".
      timestep_bias_multiplier, timestep_bias_begin, timestep_bias_end, timestep_bias_portion: of it.
      with_prior_preservation: whether pictures of the class are learned beside those of the subject.
      prior_loss_weight: how much they count.
      conditioning_dropout_prob: share of examples without text, and without picture, of InstructPix2Pix.
      guidance_scale: that a distilled network is told, and that pictures to be judged are drawn with.
      w_min, w_max: range of the guidance that a consistency model learns.
      num_ddim_timesteps: of the teacher's steps.
      loss_type: "l2" or "huber"; of preferences "sigmoid", for which "l2" stands, "hinge" or "ipo".
      huber_c: its width.
      num_inference_steps: of the pictures that a reward judges.
      reward: "brightness", or "module:function" of one's own.
      beta_dpo: how closely to stay to the model as it began.
      clip_range: of DDPO, how far a step's probability may move in an update.
      sample_batch_size: pictures that are drawn and judged at a time.
      rec_loss: of an autoencoder's pictures, "l1", "l2" or "edges", which is L1 + 2 L2 + ¼ L1 of their gradients.
      kl_scale: of the KL divergence of an AutoencoderKL's latents, for each number of a picture.
      disc_scale: how hard a critic pulls at an autoencoder, beside the reconstruction; none by default.
      disc_loss: the critic's own, "hinge" or "vanilla".
    """

    prediction_type: str | None = None
    snr_gamma: float | None = None
    weighting: str = "none"
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    dream_detail_preservation: float | None = None
    weighting_scheme: str = "stratified"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    timestep_bias_strategy: str = "none"
    timestep_bias_multiplier: float = 1.0
    timestep_bias_begin: int = 0
    timestep_bias_end: int = 1000
    timestep_bias_portion: float = 0.25
    with_prior_preservation: bool = False
    prior_loss_weight: float = 1.0
    conditioning_dropout_prob: float = 0.05
    guidance_scale: float = 3.5
    w_min: float = 5.0
    w_max: float = 15.0
    num_ddim_timesteps: int = 50
    loss_type: str = "l2"
    huber_c: float = 0.001
    num_inference_steps: int = 50
    reward: str = "brightness"
    beta_dpo: float = 2500.0
    clip_range: float = 1e-4
    sample_batch_size: int = 16
    rec_loss: str = "l2"
    kl_scale: float = 1e-6
    disc_scale: float = 0.0
    disc_loss: str = "hinge"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters move.

    Attributes:
      optimizer: "adamw", "adamw8bit", "adafactor", "lion", "prodigy", "muon" or "sgd".
      learning_rate: the highest.
      scale_lr: multiply it by the size of the whole batch.
      text_encoder_lr: of text encoders that move; by default the same.
      lr_scheduler: "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts" or "polynomial".
      lr_warmup_steps: updates before the highest rate.
      lr_num_cycles: of "cosine_with_restarts".
      lr_power: of "polynomial".
      adam_beta1, adam_beta2, adam_epsilon: of the moments.
      adam_weight_decay: of the weights.
      max_grad_norm: to which gradients are clipped.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    scale_lr: bool = False
    text_encoder_lr: float | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: float = 1.0
    lr_power: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Run:
    """How long, on what, and what is kept and seen of it.

    Attributes:
      output: folder of the result, of checkpoints and of the log.
      seed: of everything that is drawn.
      max_train_steps: updates in all.
      train_batch_size: pictures of an update, on all devices together and all parts.
      gradient_accumulation_steps: parts in which an update is computed.
      mixed_precision: "no" or "bf16", what the networks compute in; what moves is kept in float32.
      gradient_checkpointing: compute blocks again on the way back to save memory.
      mesh: how the devices share the work: dp, fsdp, tp, cp or a product such as fsdp+tp=4.
      use_ema: keep a moving average, and save that.
      ema_decay: its decay; `lcm`, whose student follows its own average, wants 0.95.
      checkpointing_steps: updates between checkpoints.
      checkpoints_total_limit: how many of the last are kept.
      best: a validation figure by which the best is kept as well, "-name" where less is better.
      logging_steps: updates between lines of the log.
      report_to: any of "jsonl", "tensorboard" and "wandb", beside the terminal.
      validation_batches: batches, the same each time, whose loss is told every `validation_steps`.
      validation_prompt: what is drawn then; several are separated by |.
      validation_steps: updates between.
      validation_image: files that they follow or change, separated by |.
      num_validation_images: of each prompt.
      profile: first and last update of a trace for TensorBoard's profiler.
      push_to_hub: id of a repository that the result is written to as well.
    """

    output: str = "runs/train"
    seed: int = 0
    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    mesh: str = "dp"
    use_ema: bool = False
    ema_decay: float = 0.9999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    best: str | None = None
    logging_steps: int = 50
    report_to: Words = ("jsonl",)
    validation_batches: int = 0
    validation_prompt: str | None = None
    validation_steps: int = 500
    validation_image: str | None = None
    num_validation_images: int = 4
    profile: tuple[int, int] | None = None
    push_to_hub: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: the recipe's name, see recipes.py, and its parts; data are described in data/."""

    recipe: str
    data: Data = Data()
    model: Model = Model()
    adapter: Adapter = Adapter()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    run: Run = Run()


def named(option: str, name: str, known: Mapping[str, Any]) -> Any:
    """What a name stands for. Raises ValueError where it stands for nothing."""
    if name not in known:
        raise ValueError(f"{option}={name!r} is not known; use one of {sorted(known)}.")
    return known[name]


PARTS = tuple(field.name for field in dataclasses.fields(Config) if field.name != "recipe")


def read(path: str | Path) -> Config:
    """The `config` that a Python file sets. The file is run: take none from strangers.

    Raises:
      ValueError: it is no Python file, or sets none, or one with a value of another type.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{path}: give a Python file that sets `config`, as those of configs/ do.")
    found = runpy.run_path(str(path)).get("config")
    if not isinstance(found, Config):
        raise ValueError(f"{path} sets no `config`; it ends with config = Config(…).")
    return _typed(found)


def based_on(file: str | Path, name: str, recipe: str | None = None, **given: Any) -> Config:
    """The configuration of another file of the same folder, with some fields set by their own names.

    Args:
      file: `__file__` of the one that asks.
      name: of the other file, without its ending.
      recipe: by default the same.
      **given: fields, whichever part they belong to.

    Raises:
      ValueError: no such file or field, or a value of another type.
    """
    config = override(read(Path(file).with_name(f"{name}.py")), given)
    return dataclasses.replace(config, recipe=recipe or config.recipe)


def fields() -> Iterator[tuple[str, dataclasses.Field, str]]:
    """Every field of every part: the part's name, the field, what its docstring says of it."""
    for part in PARTS:
        made = type(getattr(Config(""), part))
        said = inspect.cleandoc(made.__doc__ or "").split("Attributes:\n", 1)[1]
        told = {}
        for names, text in re.findall(r"^  ([\w, ]+): (.*(?:\n    .*)*)", said, re.M):
            told |= dict.fromkeys(names.split(", "), " ".join(text.split()))
        for field in dataclasses.fields(made):
            yield part, field, told[field.name]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser a flag for every field, in groups; what is not given is not among the parsed arguments."""
    groups: dict[str, Any] = {}
    for part, field, text in fields():
        group = groups.setdefault(part, parser.add_argument_group(part))
        kind, more = _reader(typing.get_type_hints(type(getattr(Config(""), part)))[field.name])
        spellings = dict.fromkeys(
            [f"--{field.name.replace('_', '-')}", f"--{field.name}"]
        )  # as diffusers spells it too
        usual = "" if field.default in (None, ()) else f" (default: {field.default})"
        group.add_argument(
            *spellings,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=(text + usual).replace("%", "%%"),
            **(
                {"action": argparse.BooleanOptionalAction}
                if kind is bool
                else {"type": kind, "metavar": kind.__name__.upper(), **more}
            ),
        )


def _reader(hint: Any) -> tuple[Any, dict[str, Any]]:
    """How a flag of a type is read, and what else argparse is told."""
    options = [one for one in typing.get_args(hint) if one is not types.NoneType]
    if isinstance(hint, types.UnionType):
        return _reader(options[0])
    if typing.get_origin(hint) is tuple:
        many = "*" if options[-1] is ... else len(options)
        return options[0], {"nargs": many}
    return hint, {}


def override(config: Config, given: dict[str, Any]) -> Config:
    """A configuration with some fields set, by their own names.

    Raises:
      ValueError: no part has such a field, or it is of another type.

    >>> override(Config("lora"), {"learning_rate": 1e-5, "rank": 8}).optimizer.learning_rate
    1e-05
    """
    part_of = {field.name: part for part, field, _ in fields()}
    for name, value in given.items():
        if name not in part_of:
            near = difflib.get_close_matches(name, part_of) or sorted(part_of)
            raise ValueError(f"There is no field {name!r}; use one of {near}.")
        value = tuple(value) if isinstance(value, list) else value
        part = dataclasses.replace(getattr(config, part_of[name]), **{name: value})
        config = dataclasses.replace(config, **{part_of[name]: part})
    return _typed(config)


def _typed(config: Config) -> Config:
    """The same configuration. Raises ValueError where a field has a value of another type."""
    for part, field, _ in fields():
        own = getattr(config, part)
        hint, value = typing.get_type_hints(type(own))[field.name], getattr(own, field.name)
        if not _fits(value, hint):
            raise ValueError(f"{field.name}={value!r}: give {getattr(hint, '__name__', hint)}.")
    return config


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in options)
    if typing.get_origin(hint) is tuple:
        long = options[-1] is ... or (isinstance(value, tuple) and len(value) == len(options))
        return long and isinstance(value, tuple) and all(_fits(one, options[0]) for one in value)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))
