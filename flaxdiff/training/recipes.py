"""What is trained, and what becomes of it: a recipe for each page of the documentation that trains something.

A recipe makes of a configuration a pipeline with its parameters, which of these move, a loss, the arrays of a batch and
a way to write the result, in the format that PyTorch's diffusers reads. All are trained by the same step and loop.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxdiff import parallel, registry
from flaxdiff.adapters import custom_diffusion, lora
from flaxdiff.checkpoint import files, pipelines
from flaxdiff.checkpoint.writing import save_model
from flaxdiff.core import Params, apply, init
from flaxdiff.models.patch_discriminator import NLayerDiscriminator
from flaxdiff.pipelines import tasks
from flaxdiff.pipelines.auto import AutoPipelineForText2Image
from flaxdiff.pipelines.generate import autoencoder, denoiser
from flaxdiff.pipelines.pipeline import DiffusionPipeline
from flaxdiff.training import adversarial, distillation, losses, noising, rewards, timesteps, words
from flaxdiff.training.config import Config, Objective, named
from flaxdiff.training.diffusion import conditions, encoded, predict, wordless
from flaxdiff.training.state import Loss
from flaxdiff.training.words import Components

Batch = Mapping[str, Any]


class Recipe(NamedTuple):
    """What there is to train.

    Attributes:
      pipe: the pipeline that draws with the result, and in whose terms the loss is.
      params: of all its components, and of what is trained beside them.
      trainable: regex of the whole paths that move.
      loss: of `batch`'s arrays.
      batch: a batch of data, arrays and lists of texts -> arrays.
      export: (folder, parameters) -> writes the result.
      images: further columns of pictures that the data need, by their names in a batch.
      captioned: whether pictures have texts.
      drops: whether texts and conditioning pictures are left out of some examples.
      judged: whether what is learned from is what the pipeline draws, see reinforce.py.
      target: whether the loss asks the moving average as well, see `train_step`, which is then kept.
      shows: the option of the pipeline's call that is a picture to follow or to change.
      draws: parameters -> those that the pipeline draws with; by default the same.
      validates: what is told of validation batches, by default the loss.
    """

    pipe: DiffusionPipeline
    params: Components
    trainable: str
    loss: Loss
    batch: Callable[[Batch], dict[str, Any]]
    export: Callable[[Path, Components], None]
    images: Mapping[str, str] = {}
    captioned: bool = True
    drops: bool = False
    judged: bool = False
    target: bool = False
    shows: str = "image"
    draws: Callable[[Components], Components] = lambda params: params
    validates: Loss | None = None


# --- what recipes share ----------------------------------------------------------------------------------------------


def load(config: Config, **options: Any) -> tuple[DiffusionPipeline, Components]:
    """The pipeline that a run starts from, with another autoencoder where one is named; remat as the run says.

    Parameters are in float32 where networks compute in it, on accelerators too, where `load` has bfloat16.
    """
    model = config.model
    if config.run.mixed_precision == "no":
        options["dtype"] = jnp.float32
    if model.pretrained_vae_model_name_or_path:
        options["vae"] = registry.find("AutoencoderKL").from_pretrained(
            model.pretrained_vae_model_name_or_path, dtype=options.get("dtype")
        )
    if config.run.mesh != "dp" or jax.process_count() > 1:  # what every device holds whole is spread later
        options["mesh"] = parallel.make_mesh(config.run.mesh)
    pipe, params = pipelines.load(
        model.pretrained_model_name_or_path, revision=model.revision, variant=model.variant, **options
    )
    return checkpointed(predicting(pipe, config), config), params


def predicting(pipe: DiffusionPipeline, config: Config) -> DiffusionPipeline:
    """The pipeline whose scheduler takes the network to say what it is trained to say."""
    kind, own = config.objective.prediction_type, pipe.scheduler
    if not kind:
        return pipe
    if noising.path_of(own).prediction_type == "flow_prediction":
        raise ValueError(f"prediction_type={kind!r}: {type(own).__name__} is of a flow, whose velocity is predicted.")
    return pipe.replace(scheduler=own.from_config(own, prediction_type=kind))


def checkpointed(pipe: DiffusionPipeline, config: Config) -> DiffusionPipeline:
    """The pipeline with what its networks compute again on the way back."""
    if not config.run.gradient_checkpointing:
        return pipe
    return pipe.replace(**{name: spec.replace(remat="full") for name, spec in pipe.specs})


SINUSOIDS = r"(?!pos_embed\.pos_embed)"  # regex of what does not move: the table of where patches are
CURVES = ("logit_normal", "mode", "cubic")  # schemes that say how times are drawn


def described(config: Config, usual: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a network that is trained from nothing: that of the file `component`, or the usual one."""
    return files.read_json(Path(config.model.component)) if config.model.component else usual


def denoising(pipe: DiffusionPipeline, given: Objective) -> Loss:
    """The denoising loss of a pipeline's network, of pictures and conditions."""
    path = noising.path_of(pipe.scheduler)
    bias = timesteps.timestep_bias(
        given.timestep_bias_strategy,
        multiplier=given.timestep_bias_multiplier,
        begin=given.timestep_bias_begin,
        end=given.timestep_bias_end,
        portion=given.timestep_bias_portion,
        rows=len(path.time),
    )
    uniform = timesteps.uniform if given.timestep_bias_strategy == "none" else timesteps.weighted(bias)
    alone = lambda density: timesteps.sampler(density, stratified=False)
    schemes = {  # how times are drawn, and how they are weighed
        "stratified": (timesteps.sampler(uniform), None),
        "none": (alone(uniform), None),
        "logit_normal": (alone(timesteps.logit_normal(given.logit_mean, given.logit_std)), None),
        "mode": (alone(timesteps.mode(given.mode_scale)), None),
        "cubic": (alone(timesteps.cubic), None),
        "sigma_sqrt": (alone(uniform), noising.sd3("sigma_sqrt")),
        "cosmap": (alone(uniform), noising.sd3("cosmap")),
    }
    draw, weight = named("weighting_scheme", given.weighting_scheme, schemes)
    weights = {
        "none": weight,
        "min_snr": noising.min_snr(given.snr_gamma or 5.0),
        "soft_min_snr": noising.soft_min_snr(given.snr_gamma or 5.0),
        "p2": noising.p2(),
        "debiased": noising.debiased(),
    }
    name = "min_snr" if given.snr_gamma and given.weighting == "none" else given.weighting
    if weight and name != "none" or given.timestep_bias_strategy != "none" and given.weighting_scheme in CURVES:
        raise ValueError(
            f"weighting_scheme={given.weighting_scheme!r} goes with no other weighting and no bias of times."
        )
    loss = losses.denoising(
        predict(pipe),
        path,
        timesteps=draw,
        weight=named("weighting", name, weights),
        noise=noising.offset(given.noise_offset) if given.noise_offset else jax.random.normal,
        input_perturbation=given.input_perturbation,
        dream_detail_preservation=given.dream_detail_preservation,
        prior_loss_weight=given.prior_loss_weight if given.with_prior_preservation else None,
    )
    return encoded(pipe, loss)


def told(pipe: DiffusionPipeline, batch: Batch, config: Config, **options: Any) -> dict[str, Any]:
    """Pictures, or their latents, and what the network is to be told of them: captions, or what encoders made of them.

    And their sizes before they were cut, and a strength of guidance, where the network is told those.
    """
    if getattr(pipe.denoiser.config, "guidance_embeds", False):
        options = {"guidance_scale": config.objective.guidance_scale, **options}
    encodings = {name: value for name, value in batch.items() if "prompt_" in name}
    captions = encodings or {"prompt": options.pop("prompt", None) or batch["caption"]}
    name, factor = ("image", 1) if "image" in batch else ("latents", tasks.vae_factor(pipe))
    shown = np.asarray(batch[name])
    height, width = (factor * side for side in shown.shape[1:3])
    arrays = conditions(pipe, **captions, height=height, width=width, **options)
    if "time_ids" in arrays and "original_size" in batch:
        sizes = batch["original_size"], batch["crop_top_left"], np.broadcast_to([height, width], (len(shown), 2))
        arrays["time_ids"] = np.concatenate(sizes, 1, dtype=np.float32, casting="unsafe")
    return {name: shown, "conditions": arrays}


def whole(folder: Path, params: Components, pipe: DiffusionPipeline) -> None:
    """Write a pipeline."""
    pipelines.save(folder, pipe, {name: params[name] for name, _ in pipe.specs})


def plain(pipe: DiffusionPipeline, params: Components, trainable: str, config: Config, **changes: Any) -> Recipe:
    """A recipe that denoises pictures of captions."""
    batch = lambda batch: told(pipe, batch, config)
    made = Recipe(
        pipe, params, trainable, denoising(pipe, config.objective), batch, functools.partial(whole, pipe=pipe)
    )
    return made._replace(**changes)


def encoders(pipe: DiffusionPipeline, config: Config) -> str:
    """Regex of the denoiser, and of CLIP's text encoders where they move too."""
    clip = [name for name, spec in pipe.specs if spec.module.__name__.startswith("CLIPText")]
    return "|".join([denoiser(dict(pipe.specs)), *(clip if config.adapter.train_text_encoder else [])])


# --- the recipes -----------------------------------------------------------------------------------------------------


def text_to_image(config: Config) -> Recipe:
    """All of the denoiser: Stable Diffusion 1, 2 and XL, PixArt, SD3, Flux; DreamBooth with `instance_prompt`."""
    pipe, params = load(config)
    moving = rf"(?:{encoders(pipe, config)})\.{SINUSOIDS}.*"
    return plain(pipe, params, moving, config)


# of a module's name, what a LoRA changes where it is not told
ATTENTIONS = r"(?:attn|attention).*\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|[qkv]_proj|out_proj)"


def with_lora(config: Config, layers: str = ATTENTIONS) -> Recipe:
    """Low-rank updates of the denoiser's attentions, of text encoders as well, or of what `target_modules` says."""
    pipe, params = load(config)
    given, own = config.adapter, encoders(pipe, config)
    key = jax.random.fold_in(jax.random.key(config.run.seed), 1)
    targets = given.target_modules or rf"(?:{own})\..*{layers}"
    adapter = lora.init_lora(pipe, key, given.rank, targets, use_dora=given.use_dora)
    share = (given.lora_alpha or given.rank) / given.rank
    adapted = lora.set_adapters(params, [adapter], [share])
    export = lambda folder, params: lora.save_lora(folder, pipe, lora.adapter_of(params))
    return plain(pipe, adapted, r".*\.(?:down|up|magnitude)", config, export=export)


def unconditional(config: Config) -> Recipe:
    """A U-Net over pixels from nothing, or from a pipeline of that kind."""
    ddpm, scheduler = registry.find("DDPMPipeline"), registry.find("DDPMScheduler")
    if config.model.pretrained_model_name_or_path:
        pipe, params = load(config)
    else:
        usual = {"sample_size": config.data.resolution, **_UNCONDITIONAL}
        given = described(config, usual)
        spec = registry.find("UNet2DModel").from_config(given)
        pipe = checkpointed(predicting(ddpm((("unet", spec),), scheduler()), config), config)
        params = {"unet": init(spec, jax.random.key(config.run.seed))}
    told_nothing = lambda batch: {
        "image": batch["image"],
        "conditions": conditions(pipe, batch_size=len(batch["image"])),
    }
    return plain(pipe, params, r"unet\..*", config, batch=told_nothing, captioned=False)


# the U-Net of the documentation's script
_UNCONDITIONAL = {
    "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}


def controlnet(config: Config) -> Recipe:
    """A ControlNet that begins as the denoiser and adds nothing: Stable Diffusion, XL, 3, Flux."""
    base, params = load(config)
    own, key = denoiser(dict(base.specs)), jax.random.fold_in(jax.random.key(config.run.seed), 1)
    led = registry.find(registry.counterpart(type(base).__name__, "text2image", True), "pipeline")
    net = registry.find(led.steers["controlnet"])
    if config.model.controlnet_model_name_or_path:
        spec, start = net.from_pretrained(config.model.controlnet_model_name_or_path)
    else:
        begin = getattr(net, "from_unet", None) or getattr(net, "from_transformer", None)
        if begin is None:
            raise ValueError(f"{net.__name__} does not begin as another network; give controlnet_model_name_or_path.")
        halvings = len(base.vae.config.block_out_channels) - 1  # of the latent, as the net reads its picture
        usual = {"conditioning_embedding_out_channels": (16, 32, 96, 256)[: halvings + 1]} if own == "unet" else {}
        given = described(config, usual)
        spec, start = begin(dict(base.specs)[own], params[own], key, **given)
    pipe = checkpointed(AutoPipelineForText2Image.from_pipe(base, controlnet=spec), config)
    params = {**params, "controlnet": start}
    option = "image" if "image" in _options(pipe) else "control_image"
    batch = lambda batch: told(pipe, batch, config, **{option: (np.asarray(batch["conditioning_image"]) + 1) / 2})
    export = lambda folder, params: save_model(folder, spec, params["controlnet"])
    images = {"conditioning_image": config.data.conditioning_image_column}
    moving = rf"controlnet\.{SINUSOIDS}.*"
    return plain(pipe, params, moving, config, batch=batch, export=export, images=images, shows=option)


def _options(pipe: DiffusionPipeline) -> set[str]:
    """What the prepares of a class beside the family's take."""
    return {name for extra in pipe.extras for name in inspect.signature(extra).parameters}


def t2i_adapter(config: Config) -> Recipe:
    """A T2I-Adapter for Stable Diffusion or XL, from nothing."""
    base, params = load(config)
    large = hasattr(base, "text_encoder_2")
    cls = registry.find("StableDiffusionXLAdapterPipeline" if large else "StableDiffusionAdapterPipeline")
    channels = list(base.unet.config.block_out_channels)
    middle = {"channels": [*channels, channels[-1]], "adapter_type": "full_adapter_xl"}  # steers that block as well
    usual = middle if large else {"channels": channels}
    factor = {"downscale_factor": 2 ** (len(base.vae.config.block_out_channels) - 1) * (2 if large else 1)}
    given = described(config, {**usual, **factor})
    spec = registry.find("T2IAdapter").from_config(given)
    pipe = checkpointed(cls.from_pipe(base, adapter=spec), config)
    start = init(spec, jax.random.fold_in(jax.random.key(config.run.seed), 1))
    batch = lambda batch: told(pipe, batch, config, image=(np.asarray(batch["conditioning_image"]) + 1) / 2)
    export = lambda folder, params: save_model(folder, spec, params["adapter"])
    images = {"conditioning_image": config.data.conditioning_image_column}
    params = {**params, "adapter": start}
    return plain(pipe, params, r"adapter\..*", config, batch=batch, export=export, images=images)


def instruct_pix2pix(config: Config) -> Recipe:
    """A U-Net that sees a picture beside the noisy one and changes it as it is told; its first layer is widened.

    Reference: Brooks et al., InstructPix2Pix: Learning to Follow Image Editing Instructions, 2023.
    """
    base, params = load(config)
    large = hasattr(base, "text_encoder_2")
    cls = registry.find(f"StableDiffusion{'XL' * large}InstructPix2PixPipeline")
    spec, first = base.unet, params["unet"]["conv_in.weight"]
    channels = base.vae.config.latent_channels
    if spec.config.in_channels == channels:
        spec = spec.replace(in_channels=2 * channels)
        widened = jnp.pad(first, ((0, 0), (0, 0), (0, channels), (0, 0)))
        params = {**params, "unet": {**params["unet"], "conv_in.weight": widened}}
    pipe = cls.from_pipe(base, unet=spec)

    def batch(batch: Batch) -> dict[str, Any]:
        made = told(pipe, batch, config, image=(np.asarray(batch["conditioning_image"]) + 1) / 2)
        if "conditioning" in batch:  # 0 where the picture is left out
            gain = made["conditions"]["beside_gain"] * np.asarray(batch["conditioning"], np.float32)
            made["conditions"]["beside_gain"] = gain.reshape(-1, 1, 1, 1)
        return made

    images = {"conditioning_image": config.data.conditioning_image_column}
    return plain(pipe, params, r"unet\..*", config, batch=batch, images=images, drops=True)


def textual_inversion_of(config: Config) -> Recipe:
    """Vectors of a new word, in every text encoder of CLIP's kind; all else stays.

    Reference: Gal et al., An Image is Worth One Word, 2022.
    """
    pipe, params, vectors = words.with_word(*load(config), config)
    loss = denoising(pipe, config.objective)
    export = functools.partial(words.save_word, config=config)
    made = plain(pipe, {**params, "word": vectors}, r"word\..*", config, export=export, captioned=False)
    return made._replace(
        loss=lambda params, batch, key: loss(words.spoken(params), batch, key),
        batch=lambda batch: told(pipe, batch, config, prompt=words.said(config, batch)),
        draws=words.spoken,
    )


def custom_diffusion_of(config: Config) -> Recipe:
    """Keys and values of the cross-attentions, all of the cross-attentions with `freeze_model="crossattn"`, and a word.

    Reference: Kumari et al., Multi-Concept Customization of Text-to-Image Diffusion, 2023.
    """
    pipe, params = load(config)
    layers = {"crossattn_kv": r"to_[kv]", "crossattn": r"to_(?:[qkv]|out\.0)"}
    moving = rf"unet\..*attn2\.{named('freeze_model', config.adapter.freeze_model, layers)}\..*"
    vectors: Params = {}
    if config.adapter.placeholder_token:
        pipe, params, vectors = words.with_word(pipe, params, config)

    def export(folder: Path, params: Components) -> None:
        custom_diffusion.save_custom_diffusion(folder, pipe, params, moving.removeprefix(r"unet\."))
        if vectors:
            words.save_word(folder, params, config)

    loss = denoising(pipe, config.objective)
    made = plain(pipe, {**params, "word": vectors}, rf"{moving}|word\..*", config, export=export)
    return made._replace(loss=lambda params, batch, key: loss(words.spoken(params), batch, key), draws=words.spoken)


def latent_consistency(config: Config) -> Recipe:
    """A student of few steps: the U-Net itself, which is told the strength of guidance; its teacher is as it began.

    What it is to say is what its moving average says, with `ema_decay`.

    Reference: Luo et al., Latent Consistency Models, 2023.
    """
    base, params = load(config)
    width = base.unet.config.time_cond_proj_dim or 256
    key = jax.random.fold_in(jax.random.key(config.run.seed), 1)
    pipe = base.replace(unet=base.unet.replace(time_cond_proj_dim=width), scheduler=_lcm(base))
    drawn = init(pipe.unet, key)
    student = {name: params["unet"].get(name, weight) for name, weight in drawn.items()}
    teacher = distillation.instead(predict(base), unet="teacher")
    made = plain(pipe, {**params, "unet": student, "teacher": params["unet"]}, r"unet\..*", config)
    made = made._replace(
        batch=lambda batch: told(base, batch, config)
    )  # the loss says what strength of guidance is told
    ask = predict(pipe)
    options = {"target": distillation.average(ask), "time_cond_proj_dim": width}
    return made._replace(**_consistent(base, ask, teacher, config, **options), target=True)


# the same for a student of few steps: convolutions and feed-forwards as well
STUDENT = (
    r"\.(?:to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv[12]|conv_shortcut|time_emb_proj"
    r"|(?:down|up)samplers\.0\.conv)"
)


def latent_consistency_lora(config: Config) -> Recipe:
    """A student of few steps as a LoRA, which serves other models of the same kind; its teacher is the model without.

    Reference: Luo et al., LCM-LoRA: A Universal Stable-Diffusion Acceleration Module, 2023.
    """
    if config.adapter.train_text_encoder:
        raise ValueError(f"{config.recipe} leaves text encoders as they are; leave out train_text_encoder.")
    made = with_lora(config, STUDENT)
    student = predict(made.pipe)
    both = _consistent(made.pipe, student, distillation.adapterless(student), config)
    return made._replace(pipe=made.pipe.replace(scheduler=_lcm(made.pipe)), **both)


def _lcm(pipe: DiffusionPipeline) -> Any:
    """The scheduler that a student of few steps is drawn with."""
    return registry.find("LCMScheduler").from_config(pipe.scheduler)


def _consistent(
    base: DiffusionPipeline, student: losses.Predict, teacher: losses.Predict, config: Config, **options: Any
) -> dict[str, Loss]:
    """The loss of a student whose teacher guides by the empty text, and how far it is from where the teacher leads."""
    given = config.objective
    path = noising.path_of(base.scheduler)
    if path.prediction_type == "flow_prediction":
        raise ValueError(f"{type(base).__name__} is a flow; {config.recipe} is for diffusion.")
    loss = functools.partial(
        distillation.latent_consistency,
        student,
        teacher,
        path,
        wordless(base, config.data.resolution),
        num_ddim_timesteps=given.num_ddim_timesteps,
        w_min=given.w_min,
        w_max=given.w_max,
        loss_type=given.loss_type,
        huber_c=given.huber_c,
        **options,
    )
    return {"loss": encoded(base, loss()), "validates": encoded(base, loss(whole=True))}


# --- rewards and preferences -----------------------------------------------------------------------------------------


def preferences(config: Config) -> Recipe:
    """A LoRA that likes what people like, from pairs: `image_column` is preferred to `rejected_image_column`.

    Reference: Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization, 2023.
    """
    made = with_lora(config)
    ours, path = predict(made.pipe), noising.path_of(made.pipe.scheduler)
    kind = {"l2": "sigmoid"}.get(config.objective.loss_type, config.objective.loss_type)
    options = {"beta_dpo": config.objective.beta_dpo, "loss_type": kind}
    loss = rewards.diffusion_dpo(ours, distillation.adapterless(ours), path, **options)

    def batch(batch: Batch) -> dict[str, Any]:
        both = {"image": np.concatenate([batch["image"], batch["rejected"]]), "caption": 2 * list(batch["caption"])}
        return told(made.pipe, both, config)

    images = {"rejected": config.data.rejected_image_column}
    return made._replace(loss=encoded(made.pipe, loss), batch=batch, images=images)


def draft(config: Config) -> Recipe:
    """A LoRA that makes a differentiable reward of its pictures rise, by gradients through the last step of sampling.

    Reference: Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards, 2023.
    """
    made, given = with_lora(config), config.objective
    judge = reward(given.reward)
    asked = {"num_inference_steps": given.num_inference_steps, "guidance_scale": given.guidance_scale}
    side = {"height": config.data.resolution, "width": config.data.resolution}
    batch = lambda batch: made.pipe.prepare_inputs(prompt=batch["caption"], **asked, **side)
    return made._replace(loss=rewards.draft(made.pipe.program, lambda images, _: judge(images)), batch=batch)


def brightness(images: jax.Array) -> jax.Array:
    """The mean of each picture [B, H, W, C] in [0, 1]: a reward to try things with."""
    return images.mean((1, 2, 3))


def reward(name: str) -> Callable[[jax.Array], jax.Array]:
    """A reward of pictures [B, H, W, C] in [0, 1] -> [B]: "brightness", or "module:function".

    Raises:
      ValueError: no such function.
    """
    if name == "brightness":
        return brightness
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward={name!r}: give 'brightness', or 'module:function' of your own ({error}).") from error


def autoencoder_of(config: Config) -> Recipe:
    """An AutoencoderKL or a VQModel, its decoder alone with `trainable="vae\\.decoder.*"`.

    With `disc_scale` it has to deceive a critic, which begins from nothing and learns at every update too.

    Raises:
      ValueError: an autoencoder of another kind or none; a critic that `trainable` leaves as it begins.

    Reference: Esser et al., Taming Transformers for High-Resolution Image Synthesis, 2021.
    """
    pipe, params = load(config)
    given, specs = config.objective, dict(pipe.specs)
    name, critic = autoencoder(specs), "discriminator"
    spec = specs.get(name)
    kinds = {"AutoencoderKL": adversarial.gaussian(given.kl_scale), "VQModel": adversarial.codebook()}
    kind = spec.module.__name__ if spec else "none"
    if kind not in kinds:
        raise ValueError(f"recipe='autoencoder' trains {' or '.join(kinds)}; this pipeline has {kind}: give another.")
    bottleneck, judge = kinds[kind], None
    if given.disc_scale:
        chosen = config.model.trainable
        if chosen and not re.fullmatch(chosen, f"{critic}.main.0.weight"):
            raise ValueError(
                f"trainable={chosen!r} leaves the critic of disc_scale as it begins; give '{chosen}|{critic}\\..*'."
            )
        net = NLayerDiscriminator.from_config({})
        params = {**params, critic: init(net, jax.random.fold_in(jax.random.key(config.run.seed), 1))}
        judge = lambda params, image, batch: apply(net, params[critic], image)
    loss = adversarial.autoencoding(
        spec, bottleneck, judge, rec_loss=given.rec_loss, disc_scale=given.disc_scale, component=name
    )
    if judge:
        against = adversarial.critic(judge, adversarial.remade(spec, bottleneck, name), disc_loss=given.disc_loss)
        loss = adversarial.together(loss, against, name, critic)
    return Recipe(
        pipe,
        params,
        rf"({name}|{critic})\..*" if judge else rf"{name}\..*",
        loss,
        lambda batch: {"image": batch["image"]},
        lambda folder, params: save_model(folder, spec, params[name]),
        captioned=False,
    )


RECIPES: dict[str, Callable[[Config], Recipe]] = {
    "text_to_image": text_to_image,
    "lora": with_lora,
    "unconditional": unconditional,
    "controlnet": controlnet,
    "t2i_adapter": t2i_adapter,
    "instruct_pix2pix": instruct_pix2pix,
    "textual_inversion": textual_inversion_of,
    "custom_diffusion": custom_diffusion_of,
    "autoencoder": autoencoder_of,
    "dpo_lora": preferences,
    "draft_lora": draft,
    "ddpo_lora": lambda config: with_lora(config)._replace(judged=True),
    "lcm": latent_consistency,
    "lcm_lora": latent_consistency_lora,
}
