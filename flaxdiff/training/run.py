"""A run from its configuration to the files that it leaves: `flaxdiff train CONFIG`, or `train(config)` from Python.

Everything is checked before work begins: the recipe, the data's columns, the folder, the room on the disk, the mesh.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from PIL import Image

from flaxdiff import parallel
from flaxdiff.checkpoint import files, hub
from flaxdiff.images import make_image_grid
from flaxdiff.training import emoji, loop, report, state
from flaxdiff.training.config import Config, named
from flaxdiff.training.data import (
    Batches,
    DataLoader,
    Examples,
    PriorPreservation,
    Stored,
    Stream,
    generate_aspect_ratio_buckets,
    open_source,
)
from flaxdiff.training.data.pictures import SUFFIXES
from flaxdiff.training.data.stored import Precomputed
from flaxdiff.training.data.tables import Streamed
from flaxdiff.training.optimizers import optimizer, schedule
from flaxdiff.training.recipes import RECIPES, Components, Recipe
from flaxdiff.training.reinforce import reinforce

ENCODED = ("text_to_image", "lora")  # recipes that need no pictures where there are latents
FAR = 1 << 20  # batches beyond those of any run
DTYPES = {"no": None, "bf16": jnp.bfloat16}


def train(config: Config) -> Components:
    """Run a configuration to its end, from its last checkpoint if there is one, and write the result.

    Returns:
      The parameters that the pipeline draws with.

    Raises:
      ValueError: an unknown recipe or name, a data set of no use, a batch that does not divide, a URL as output.
      ImportError: a library that is asked for is not installed.
      OSError: the folder cannot be written.
    """
    given, folder = config.run, files.local(config.run.output)
    recipe = named("recipe", config.recipe, RECIPES)(config)
    recipe = recipe._replace(trainable=config.model.trainable or recipe.trainable)
    dtype = named("mixed_precision", given.mixed_precision, DTYPES)
    mesh = parallel.make_mesh(given.mesh)
    shards, size = math.prod(mesh.shape[axis] for axis in parallel.batch_axes(mesh)), given.train_batch_size
    if not recipe.judged and size % shards:
        raise ValueError(
            f"train_batch_size={size} does not divide among the {shards} devices that share a batch; give a multiple, "
            f"e.g. {-(-size // shards) * shards}, or another mesh than {given.mesh!r}."
        )
    data = batches(config, recipe)
    key = jax.random.key(given.seed)
    tx = optimiser(config)
    told = writers(config)

    if recipe.judged:
        with parallel.among(recipe.params):
            params = reinforce(config, recipe, data, tx, told)
        written(config, recipe, params)
        return params
    with jax.set_mesh(mesh):
        create = functools.partial(
            state.create, tx=tx, trainable=recipe.trainable, average=given.use_ema or recipe.target
        )
        params = jax.device_put(recipe.params, parallel.shardings(recipe.params, mesh))
        places = parallel.shardings(jax.eval_shape(create, params), mesh)
        parts = given.gradient_accumulation_steps
        options = {"dtype": dtype, "parts": parts, "target": recipe.target}
        step = state.jitted(recipe.loss, tx, given.ema_decay, places=places, **options)
        first, params, recipe = [jax.jit(create, out_shardings=places)(params)], None, recipe._replace(params={})
        place = lambda batch: parallel.shard(recipe.batch(batch), mesh, part=jax.process_count() > 1)
        final = loop.fit(
            step,
            first.pop(),  # nobody else is to hold it
            data,
            key,
            given.max_train_steps,
            directory=folder / "checkpoints",
            save_every=given.checkpointing_steps,
            keep=given.checkpoints_total_limit,
            best=given.best,
            log_every=given.logging_steps,
            writers=told,
            validate=validation(config, recipe, data, place, dtype),
            validate_every=given.validation_steps,
            place=place,
            profile=given.profile,
            examples=given.train_batch_size,
        )
        params = learned(config, final)
        written(config, recipe, params)
    return recipe.draws(params)


def learned(config: Config, now: state.TrainState) -> Components:
    """The parameters that are looked at and written: those that move, or with `use_ema` their averages."""
    return state.averaged(now) if config.run.use_ema else now.params


def written(config: Config, recipe: Recipe, params: Components) -> None:
    """Write the result, by the first process; to the Hub as well, without checkpoints, where the run says so."""
    params = parallel.collected(params)
    if jax.process_index() == 0:
        recipe.export(Path(config.run.output), params)
        if config.run.push_to_hub:
            with tempfile.TemporaryDirectory() as folder:
                recipe.export(Path(folder), params)
                hub.upload(config.run.push_to_hub, Path(folder), None, None, False, "Trained with flaxdiff")
    sync_global_devices("written")  # nobody leaves before


def batches(config: Config, recipe: Recipe) -> DataLoader:
    """The data of a run."""
    given, objective = config.data, config.objective
    if given.train_data is None:
        raise ValueError("Give train_data=, a folder or the name of a data set; see `flaxdiff train --help`.")
    images = {"image": given.image_column, **recipe.images}
    examples = Examples(
        resolution=given.resolution,
        aspect_ratio_buckets=generate_aspect_ratio_buckets(given.resolution) if given.aspect_ratio_buckets else (),
        images=images,
        texts={"caption": given.caption_column} if recipe.captioned else {},
        prompt=given.instance_prompt,
        center_crop=given.center_crop,
        random_flip=given.random_flip,
        image_interpolation_mode=given.image_interpolation_mode,
        proportion_empty_prompts=given.proportion_empty_prompts,
        conditioning_dropout_prob=objective.conditioning_dropout_prob if recipe.drops else 0.0,
    )
    pairs = objective.with_prior_preservation or "rejected" in recipe.images
    if pairs and jax.process_count() > 1:
        raise ValueError(f"{config.recipe} of pairs of pictures runs in one process; start it on one host.")
    if given.streaming and (objective.with_prior_preservation or config.run.validation_batches or recipe.judged):
        raise ValueError("A stream cannot be asked for batches by number; leave out streaming, or what needs them.")
    parts, size = 1 + objective.with_prior_preservation, config.run.train_batch_size
    if size % parts:
        raise ValueError(f"train_batch_size={size}: half of it pictures, half of their class; give an even number.")

    def of(source: Any, examples: Examples, limit: int | None) -> Batches | Stream:
        return (Stream if isinstance(source, Streamed) else Batches).of(
            source,
            examples,
            objective.sample_batch_size if recipe.judged else size // parts,
            seed=config.run.seed,
            max_train_samples=limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    options = {"dataset_config_name": given.dataset_config_name, "streaming": given.streaming, "split": given.split}
    columns, emojis = tuple(images.values()), given.train_data == "emoji"
    source = emoji.Drawn() if emojis else open_source(given.train_data, images=columns, **options)
    if isinstance(source, Precomputed):
        if config.recipe not in ENCODED or given.instance_prompt or config.adapter.train_text_encoder or pairs:
            raise ValueError(
                f"{given.train_data} holds latents and texts that were encoded before, which are for "
                f"{' and '.join(ENCODED)} without instance_prompt, train_text_encoder and pairs; give pictures."
            )
        examples = Stored(proportion_empty_prompts=given.proportion_empty_prompts)
    made = of(source, examples, given.max_train_samples)
    if objective.with_prior_preservation:
        prior = dataclasses.replace(examples, images={"image": "image"}, prompt=given.class_prompt)
        made = PriorPreservation(made, of(open_source(class_pictures(config, recipe)), prior, None))
    return DataLoader(made, given.dataloader_num_workers)


def class_pictures(config: Config, recipe: Recipe) -> str:
    """The folder with pictures of the class, once what is missing there has been drawn.

    Raises:
      ValueError: there is no such folder or prompt given.
    """
    given = config.data
    if not given.class_data or not given.class_prompt:
        raise ValueError("with_prior_preservation needs class_data=, a folder, and class_prompt=, what they show.")
    folder = Path(given.class_data)
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    pipe, params = recipe.pipe, recipe.draws(recipe.params)
    for n in range(there, given.num_class_images):
        key = jax.random.fold_in(jax.random.key(config.run.seed), n)
        image = pipe(params, key, prompt=given.class_prompt, height=given.resolution, width=given.resolution).images[0]
        image.save(folder / f"class_{n:05}.png")
    return given.class_data


def optimiser(config: Config) -> Any:
    """The optimiser of a run, with its schedule."""
    o = config.optimizer
    peak = o.learning_rate * (config.run.train_batch_size if o.scale_lr else 1)
    rate = schedule(o.lr_scheduler, peak, config.run.max_train_steps, o.lr_warmup_steps, o.lr_num_cycles, o.lr_power)
    factors = [] if o.text_encoder_lr is None else [(r"^text_encoder", o.text_encoder_lr / o.learning_rate)]
    return optimizer(
        o.optimizer,
        rate,
        b1=o.adam_beta1,
        b2=o.adam_beta2,
        eps=o.adam_epsilon,
        decay=o.adam_weight_decay,
        max_grad_norm=o.max_grad_norm,
        factors=factors,
    )


def writers(config: Config) -> list[report.Writer]:
    """What is told of the run: the terminal, and what `report_to` says."""
    folder = Path(config.run.output)
    if jax.process_index():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        "jsonl": lambda: report.jsonl(folder / "log.jsonl"),
        "tensorboard": lambda: report.tensorboard(folder / "tensorboard"),
        "wandb": lambda: report.wandb("flaxdiff", dir=str(folder)),
    }
    return [report.bar(), *(named("report_to", name, known)() for name in config.run.report_to)]


def validation(config: Config, recipe: Recipe, data: DataLoader, place: Callable, dtype: Any) -> Any:
    """What is looked at now and then, with the moving average where there is one: a loss, pictures, or nothing.

    The loss is that of a few batches far ahead in the data, with the same noise each time; of a student of few steps,
    how far its single step is from where the teacher's many lead.
    """
    given, key = config.run, jax.random.key(config.run.seed)
    prompts = given.validation_prompt.split("|") if given.validation_prompt else []
    if not prompts and not given.validation_batches:
        return None
    images = [Image.open(path).convert("RGB") for path in (given.validation_image or "").split("|") if path]
    pipe = recipe.pipe.replace(progress=False)
    judge = recipe.validates or recipe.loss
    loss = jax.jit(lambda params, *given: judge(state.computed(params, dtype), *given)[0])
    side = {"height": config.data.resolution, "width": config.data.resolution} if recipe.captioned else {}

    def look(now: state.TrainState) -> dict[str, Any]:
        params, found = learned(config, now), {}
        if given.validation_batches:
            seen = [place(data.batches[FAR + n]) for n in range(given.validation_batches)]
            each = [loss(params, batch, jax.random.fold_in(key, n)) for n, batch in enumerate(seen)]
            found["validation_loss"] = float(np.mean(jax.device_get(each)))
        if prompts:
            params, many = recipe.draws(params), given.num_validation_images
            more = {recipe.shows: [images[i % len(images)] for i in range(len(prompts))]} if images else {}
            made = pipe(params, key, prompt=prompts, num_images_per_prompt=many, **more, **side).images
            found["validation"] = make_image_grid(made, rows=len(prompts), cols=many)
        return found

    return look
