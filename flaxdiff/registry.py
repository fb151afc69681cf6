"""The names that checkpoints and users know, and where each of them lives.

`TABLE` is the one list: the public face of the package, the classes that a `model_index.json` may name, and nothing
else. A module is imported when a name in it is first asked for; a name in a file is only ever looked up here.
"""

import difflib
import importlib
from typing import Any

LED, PAG = " led by ControlNets", " with perturbed attention"
# what sort of thing -> module -> names
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "function": {
        "flaxdiff.core": ("abstract", "apply", "init", "layout"),
        "flaxdiff.checkpoint": ("load", "push_to_hub", "save"),
        "flaxdiff.adapters.control_lora": ("load_control_lora",),
        "flaxdiff.adapters.custom_diffusion": ("load_custom_diffusion",),
        "flaxdiff.adapters.lora": (
            "adapter_of",
            "fuse_lora",
            "init_lora",
            "load_lora",
            "read_lora",
            "save_lora",
            "set_adapters",
            "unfuse_lora",
            "unload_lora",
        ),
        "flaxdiff.adapters.ip_adapter": ("load_ip_adapter",),
        "flaxdiff.adapters.merge": ("merge_adapters",),
        "flaxdiff.adapters.textual_inversion": ("load_textual_inversion",),
        "flaxdiff.evaluation": (
            "clip_score",
            "directional_similarity",
            "evaluate",
            "frechet_distance",
            "kernel_distance",
        ),
        "flaxdiff.images": ("load_image", "make_image_grid", "numpy_to_pil"),
        "flaxdiff.memory": ("cast", "offload", "quantize", "residency"),
        "flaxdiff.pipelines.afterwards": ("invisible_watermark",),
        "flaxdiff.pipelines.inversion": ("invert",),
        "flaxdiff.pipelines.prompts": ("encode_prompts",),
        "flaxdiff.schedulers": ("scheduler",),
        "flaxdiff.parallel": ("distribute", "make_mesh", "replicate", "shard", "shardings"),
        "flaxdiff.planning.plan": ("plan",),
    },
    "other": {
        "flaxdiff.adapters.control": (
            "FluxMultiControlNetModel",
            "MultiAdapter",
            "MultiControlNetModel",
            "SD3MultiControlNetModel",
        ),
        "flaxdiff.checkpoint.pipelines": ("EMOJI",),
        "flaxdiff.core": ("FromOriginalModelMixin", "ModelMixin", "Spec"),
        "flaxdiff.images": ("IPAdapterMaskProcessor", "VaeImageProcessor"),
        "flaxdiff.pipelines.auto": (
            "AutoPipelineForImage2Image",
            "AutoPipelineForInpainting",
            "AutoPipelineForText2Image",
        ),
        "flaxdiff.pipelines.ledits": ("LEditsPPDiffusionPipelineOutput", "LEditsPPInversionPipelineOutput"),
        "flaxdiff.pipelines.guided": ("SafetyConfig",),
        "flaxdiff.pipelines.calling": (
            "BaseOutput",
            "FluxPipelineOutput",
            "ImagePipelineOutput",
            "StableDiffusionPipelineOutput",
            "StableDiffusionXLPipelineOutput",
        ),
        "flaxdiff.pipelines.ldm3d": ("LDM3DPipelineOutput",),
        "flaxdiff.pipelines.unidiffuser": ("ImageTextPipelineOutput",),
        "flaxdiff.pipelines.mixins": (
            "AmusedLoraLoaderMixin",
            "FromSingleFileMixin",
            "IPAdapterMixin",
            "LoraBaseMixin",
            "PeftAdapterMixin",
            "PushToHubMixin",
            "SD3LoraLoaderMixin",
            "StableDiffusionLoraLoaderMixin",
            "StableDiffusionMixin",
            "StableDiffusionXLLoraLoaderMixin",
            "TextualInversionLoaderMixin",
            "UNet2DConditionLoadersMixin",
        ),
        "flaxdiff.schedulers": ("AysSchedules", "KarrasDiffusionSchedulers", "SchedulerMixin"),
        "flaxdiff.weights": ("Float8", "Int8", "LoRA"),
    },
    "model": {
        "flaxdiff.models.autoencoder_asym_kl": ("AsymmetricAutoencoderKL",),
        "flaxdiff.models.autoencoder_kl": ("AutoencoderKL",),
        "flaxdiff.models.autoencoder_tiny": ("AutoencoderTiny",),
        "flaxdiff.models.consistency_decoder_vae": ("ConsistencyDecoderVAE",),
        "flaxdiff.models.bert": ("BertModel",),
        "flaxdiff.models.blip2": ("Blip2QFormerModel",),
        "flaxdiff.models.clip": ("CLIPTextModel", "CLIPTextModelWithProjection", "ContextCLIPTextModel"),
        "flaxdiff.models.clip_image_projection": ("CLIPImageProjection",),
        "flaxdiff.models.clip_model": ("CLIPModel",),
        "flaxdiff.models.clip_vision": ("CLIPVisionModelWithProjection",),
        "flaxdiff.models.dit_transformer_2d": ("DiTTransformer2DModel",),
        "flaxdiff.models.dpt": ("DPTForDepthEstimation",),
        "flaxdiff.models.flux_transformer_2d": ("FluxTransformer2DModel",),
        "flaxdiff.models.ip_adapter": ("IPAdapter", "SD3IPAdapter"),
        "flaxdiff.models.language_model": (
            "Gemma2Model",
            "Gemma3ForConditionalGeneration",
            "Gemma3TextModel",
            "GemmaForCausalLM",
            "GemmaModel",
            "GlmModel",
            "LlamaForCausalLM",
            "LlamaModel",
            "Mistral3ForConditionalGeneration",
            "MistralModel",
            "Qwen2Model",
            "Qwen3ForCausalLM",
            "Qwen3Model",
            "SmolLM3ForCausalLM",
            "SmolLM3Model",
        ),
        "flaxdiff.models.ldm_bert": ("LDMBertModel",),
        "flaxdiff.models.qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
        "flaxdiff.models.siglip": ("SiglipVisionModel",),
        "flaxdiff.models.dinov2": ("Dinov2Model", "Dinov2WithRegistersModel"),
        "flaxdiff.models.paint_by_example": ("PaintByExampleImageEncoder",),
        "flaxdiff.models.controlnet": ("ControlNetModel",),
        "flaxdiff.models.controlnet_flux": ("FluxControlNetModel",),
        "flaxdiff.models.controlnet_sd3": ("SD3ControlNetModel",),
        "flaxdiff.models.controlnet_xs": ("ControlNetXSAdapter", "UNetControlNetXSModel"),
        "flaxdiff.models.inception_v3": ("InceptionV3",),
        "flaxdiff.models.pixart_transformer_2d": ("PixArtTransformer2DModel",),
        "flaxdiff.models.redux": ("ReduxImageEncoder",),
        "flaxdiff.models.safety_checker": ("StableDiffusionSafetyChecker",),
        "flaxdiff.models.t2i_adapter": ("T2IAdapter",),
        "flaxdiff.models.t5": ("T5EncoderModel", "UMT5EncoderModel"),
        "flaxdiff.models.prior_transformer": ("PriorTransformer",),
        "flaxdiff.models.transformer_sd3": ("SD3Transformer2DModel",),
        "flaxdiff.models.unclip": ("StableUnCLIPImageNormalizer", "UnCLIPTextProjModel"),
        "flaxdiff.models.unet_2d": ("UNet2DModel",),
        "flaxdiff.models.unet_2d_condition": ("UNet2DConditionModel",),
        "flaxdiff.models.unidiffuser": ("UniDiffuserModel",),
        "flaxdiff.models.unidiffuser_text_decoder": ("UniDiffuserTextDecoder",),
        "flaxdiff.models.uvit_2d": ("UVit2DModel",),
        "flaxdiff.models.vq_model": ("VQModel",),
    },
    "scheduler": {
        "flaxdiff.schedulers": (
            "AmusedScheduler",
            "CMStochasticIterativeScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "ConsistencyDecoderScheduler",
            "CosineDPMSolverMultistepScheduler",
            "DDIMInverseScheduler",
            "DDIMParallelScheduler",
            "DDIMScheduler",
            "DDPMParallelScheduler",
            "DDPMScheduler",
            "DDPMWuerstchenScheduler",
            "DEISMultistepScheduler",
            "DPMSolver2SAncestralScheduler",
            "DPMSolverAdaptiveScheduler",
            "DPMSolverFastScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSDEScheduler",
            "DPMSolverSinglestepScheduler",
            "EDMDPMSolverMultistepScheduler",
            "EDMEulerScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "HeunDiscreteScheduler",
            "IPNDMScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "KarrasVeScheduler",
            "LCMScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "RePaintScheduler",
            "SASolverScheduler",
            "SCMScheduler",
            "ScoreSdeVeScheduler",
            "ScoreSdeVpScheduler",
            "TCDScheduler",
            "UnCLIPScheduler",
            "UniPCMultistepScheduler",
            "VQDiffusionScheduler",
        ),
    },
    "pipeline": {
        "flaxdiff.pipelines.amused": ("AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "AmusedPipeline"),
        "flaxdiff.pipelines.blip_diffusion": ("BlipDiffusionControlNetPipeline", "BlipDiffusionPipeline"),
        "flaxdiff.pipelines.controlled": (
            "StableDiffusionAdapterPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
        ),
        "flaxdiff.pipelines.controlnet_xs": (
            "StableDiffusionControlNetXSPipeline",
            "StableDiffusionXLControlNetXSPipeline",
        ),
        "flaxdiff.pipelines.dit": ("DiTPipeline",),
        "flaxdiff.pipelines.diffedit": ("StableDiffusionDiffEditPipeline",),
        "flaxdiff.pipelines.flux": (
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxControlPipeline",
            "FluxFillPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxKontextInpaintPipeline",
            "FluxKontextPipeline",
            "FluxPipeline",
        ),
        "flaxdiff.pipelines.flux_controlnet": (
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
            "FluxControlNetPipeline",
        ),
        "flaxdiff.pipelines.flux_redux": ("FluxPriorReduxPipeline",),
        "flaxdiff.pipelines.gligen": ("StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline"),
        "flaxdiff.pipelines.image_variation": ("PaintByExamplePipeline", "StableDiffusionImageVariationPipeline"),
        "flaxdiff.pipelines.k_diffusion": ("StableDiffusionKDiffusionPipeline", "StableDiffusionXLKDiffusionPipeline"),
        "flaxdiff.pipelines.latent_diffusion": ("LDMSuperResolutionPipeline", "LDMTextToImagePipeline"),
        "flaxdiff.pipelines.latent_upscale": ("StableDiffusionLatentUpscalePipeline",),
        "flaxdiff.pipelines.ldm3d": ("StableDiffusionLDM3DPipeline",),
        "flaxdiff.pipelines.ledits": ("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL"),
        "flaxdiff.pipelines.guided": (
            "SemanticStableDiffusionPipeline",
            "StableDiffusionAttendAndExcitePipeline",
            "StableDiffusionControlNetPAGInpaintPipeline",
            "StableDiffusionControlNetPAGPipeline",
            "StableDiffusionPAGImg2ImgPipeline",
            "StableDiffusionPAGInpaintPipeline",
            "StableDiffusionPAGPipeline",
            "StableDiffusionPipelineSafe",
            "StableDiffusionSAGPipeline",
            "StableDiffusionXLControlNetPAGImg2ImgPipeline",
            "StableDiffusionXLControlNetPAGPipeline",
            "StableDiffusionXLPAGImg2ImgPipeline",
            "StableDiffusionXLPAGInpaintPipeline",
            "StableDiffusionXLPAGPipeline",
        ),
        "flaxdiff.pipelines.panorama": ("StableDiffusionPanoramaPipeline",),
        "flaxdiff.pipelines.pipeline": ("DiffusionPipeline",),
        "flaxdiff.pipelines.pixart": ("PixArtAlphaPipeline", "PixArtSigmaPAGPipeline", "PixArtSigmaPipeline"),
        "flaxdiff.pipelines.stable_diffusion": (
            "LatentConsistencyModelImg2ImgPipeline",
            "LatentConsistencyModelPipeline",
            "StableDiffusionDepth2ImgPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionInstructPix2PixPipeline",
            "StableDiffusionPipeline",
            "StableDiffusionUpscalePipeline",
        ),
        "flaxdiff.pipelines.stable_diffusion_3": (
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3PAGImg2ImgPipeline",
            "StableDiffusion3PAGPipeline",
            "StableDiffusion3Pipeline",
        ),
        "flaxdiff.pipelines.stable_diffusion_3_controlnet": (
            "StableDiffusion3ControlNetInpaintingPipeline",
            "StableDiffusion3ControlNetPipeline",
        ),
        "flaxdiff.pipelines.stable_diffusion_xl": (
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLInstructPix2PixPipeline",
            "StableDiffusionXLPipeline",
        ),
        "flaxdiff.pipelines.stable_unclip": ("StableUnCLIPImg2ImgPipeline", "StableUnCLIPPipeline"),
        "flaxdiff.pipelines.unclip": ("UnCLIPImageVariationPipeline", "UnCLIPPipeline"),
        "flaxdiff.pipelines.unconditional": (
            "ConsistencyModelPipeline",
            "DDIMPipeline",
            "DDPMPipeline",
            "RePaintPipeline",
        ),
        "flaxdiff.pipelines.unidiffuser": ("UniDiffuserPipeline",),
    },
    "flax": {
        "flaxdiff.flax_api": (
            "FlaxDDIMScheduler",
            "FlaxDDPMScheduler",
            "FlaxDPMSolverMultistepScheduler",
            "FlaxDiffusionPipeline",
            "FlaxEulerDiscreteScheduler",
            "FlaxImagePipelineOutput",
            "FlaxLMSDiscreteScheduler",
            "FlaxPNDMScheduler",
            "FlaxStableDiffusionControlNetPipeline",
            "FlaxStableDiffusionControlNetPipelineOutput",
            "FlaxStableDiffusionImg2ImgPipeline",
            "FlaxStableDiffusionInpaintPipeline",
            "FlaxStableDiffusionPipeline",
            "FlaxStableDiffusionPipelineOutput",
            "FlaxStableDiffusionXLPipeline",
        ),
        "flaxdiff.flax_models": (
            "FlaxAutoencoderKL",
            "FlaxAutoencoderKLOutput",
            "FlaxControlNetModel",
            "FlaxControlNetOutput",
            "FlaxDecoderOutput",
            "FlaxModelMixin",
            "FlaxUNet2DConditionModel",
            "FlaxUNet2DConditionOutput",
        ),
    },
    "tokenizer": {
        "transformers": (
            "BertTokenizer",
            "BertTokenizerFast",
            "CLIPTokenizer",
            "CLIPTokenizerFast",
            "GPT2Tokenizer",
            "GPT2TokenizerFast",
            "GemmaTokenizer",
            "GemmaTokenizerFast",
            "LlamaTokenizer",
            "LlamaTokenizerFast",
            "PreTrainedTokenizerFast",
            "Qwen2Tokenizer",
            "Qwen2TokenizerFast",
            "T5Tokenizer",
            "T5TokenizerFast",
        ),
    },
}


def _named(family: str) -> dict[str, str]:
    """What each class of a family is for -> its name."""
    every = {name for group in TABLE["pipeline"].values() for name in group}
    names = {
        f"{purpose}{led}{pag}": f"{family}{'ControlNet' if led else ''}{'PAG' if pag else ''}{task}Pipeline"
        for purpose, task in (("text2image", ""), ("image2image", "Img2Img"), ("inpainting", "Inpaint"))
        for led in ("", LED)
        for pag in ("", PAG)
    }
    return {purpose: name for purpose, name in names.items() if name in every}


# the classes that do the same with other beginnings: what each of them is for -> its name, also with ControlNets or PAG
COUNTERPARTS: tuple[dict[str, str], ...] = tuple(
    _named(family)
    for family in ("Amused", "Flux", "FluxControl", "PixArtSigma", "StableDiffusion", "StableDiffusionXL")
) + (
    {**_named("StableDiffusion3"), "inpainting" + LED: "StableDiffusion3ControlNetInpaintingPipeline"},
    {"text2image": "LatentConsistencyModelPipeline", "image2image": "LatentConsistencyModelImg2ImgPipeline"},
    {"text2image": "PixArtAlphaPipeline"},
    {
        "text2image": "FluxKontextPipeline",
        "image2image": "FluxKontextPipeline",
        "inpainting": "FluxKontextInpaintPipeline",
    },
    {"inpainting": "FluxFillPipeline"},
)
PUBLIC = {
    name: module
    for sort, modules in TABLE.items()
    if sort != "tokenizer"
    for module, names in modules.items()
    for name in names
}


def names(sort: str) -> list[str]:
    """The names of one sort.

    >>> "AutoencoderKL" in names("model")
    True
    """
    return [name for group in TABLE[sort].values() for name in group]


def sort_of(name: str, *sorts: str) -> str:
    """Which of these sorts of thing a name is.

    Args:
      name: e.g. "UNet2DConditionModel"; anything at all when it comes from a file.
      *sorts: of `TABLE`, e.g. "model".

    Raises:
      ValueError: nothing of these sorts has that name; says what is near, and what there is.

    >>> sort_of("PNDMScheduler", "model", "scheduler")
    'scheduler'
    """
    for sort in sorts:
        if name in names(sort):
            return sort
    known = sorted(known for sort in sorts for known in names(sort))
    near = difflib.get_close_matches(str(name), known, 3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"flaxdiff has no {' or '.join(sorts)} called {name!r}; {hint}It has {', '.join(known)}.")


def counterpart(name: str, purpose: str, led: bool | None = None, pag: bool | None = None) -> str:
    """The class for a purpose that belongs to the same models as a class at hand. Raises ValueError if there is none.

    Args:
      name: of the class at hand.
      purpose: "text2image", "image2image" or "inpainting".
      led, pag: whether by ControlNets, and with perturbed attention; by default as the class at hand.

    >>> counterpart("StableDiffusionXLPipeline", "inpainting")
    'StableDiffusionXLInpaintPipeline'
    >>> counterpart("StableDiffusionPipeline", "text2image", led=True)
    'StableDiffusionControlNetPipeline'
    """
    sort_of(name, "pipeline")
    for row in COUNTERPARTS:
        for own in (key for key in row if row[key] == name):
            wanted = purpose + LED * (LED in own if led is None else led) + PAG * (PAG in own if pag is None else pag)
            if wanted in row:
                return row[wanted]
    has = sorted(row[purpose] for row in COUNTERPARTS if purpose in row)
    what = purpose + LED * bool(led) + PAG * bool(pag)
    raise ValueError(f"There is no pipeline for {what} beside {name}; there are {', '.join(has)}.")


def find(name: str, *sorts: str) -> Any:
    """The class of a name, imported now; by default a model, a scheduler or a pipeline. Raises as `sort_of` does.

    >>> find("UNet2DConditionModel").library
    'diffusers'
    """
    sort = sort_of(name, *(sorts or ("model", "scheduler", "pipeline")))
    module = next(module for module, group in TABLE[sort].items() if name in group)
    return getattr(importlib.import_module(module), name)
