"""The published configurations of well-known checkpoints: what there is to know of a model without its weights.

The planner compiles from them, and the tests hold every network here against PyTorch's class at full size by shapes
alone. The networks' settings are those that their config.json files set and that differ from the defaults.
"""

from typing import Any

_XL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    use_linear_projection=True,
    sample_size=128,
)
_VAE = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
)
_FLUX_VAE = dict(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
)
_CONSISTENCY = dict(attention_head_dim=64, attn_norm_num_groups=32, downsample_type="resnet", upsample_type="resnet")
_PIXART = dict(caption_channels=4096, sample_size=128)
_SD3 = dict(joint_attention_dim=4096, pooled_projection_dim=2048, out_channels=16)
_T5_XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")

# name -> (class, the settings of its config.json that differ from the defaults)
COMPONENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5 UNet": ("UNet2DConditionModel", dict(cross_attention_dim=768, attention_head_dim=8, sample_size=64)),
    "SD 1.5 inpainting UNet": (
        "UNet2DConditionModel",
        dict(cross_attention_dim=768, attention_head_dim=8, in_channels=9),
    ),
    "GLIGEN UNet": (
        "UNet2DConditionModel",
        dict(cross_attention_dim=768, attention_head_dim=8, sample_size=64, attention_type="gated"),
    ),
    "GLIGEN inpainting UNet for phrases and pictures": (
        "UNet2DConditionModel",
        dict(cross_attention_dim=768, attention_head_dim=8, in_channels=9, attention_type="gated-text-image"),
    ),
    "SD 2.1 UNet": (
        "UNet2DConditionModel",
        dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True, sample_size=96),
    ),
    "SDXL base UNet": (
        "UNet2DConditionModel",
        dict(
            _XL,
            block_out_channels=[320, 640, 1280],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048,
            projection_class_embeddings_input_dim=2816,
        ),
    ),
    "SDXL refiner UNet": (
        "UNet2DConditionModel",
        dict(
            _XL,
            block_out_channels=[384, 768, 1536, 1536],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=[6, 12, 24, 24],
            transformer_layers_per_block=4,
            cross_attention_dim=1280,
            projection_class_embeddings_input_dim=2560,
        ),
    ),
    "SD VAE": ("AutoencoderKL", dict(_VAE, sample_size=512)),
    "SDXL VAE": ("AutoencoderKL", dict(_VAE, sample_size=1024, scaling_factor=0.13025)),
    "SD 1.5 text encoder": (
        "CLIPTextModel",
        dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    ),
    "SD 2.1 text encoder": (
        "CLIPTextModel",
        dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23, hidden_act="gelu"),
    ),
    "SDXL text encoder 2": (
        "CLIPTextModelWithProjection",
        dict(
            hidden_size=1280,
            intermediate_size=5120,
            num_attention_heads=20,
            num_hidden_layers=32,
            hidden_act="gelu",
            projection_dim=1280,
        ),
    ),
    "SD3 text encoder": (
        "CLIPTextModelWithProjection",
        dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    ),
    "T5 v1.1 XXL text encoder": ("T5EncoderModel", _T5_XXL),
    "UMT5 XXL text encoder": ("UMT5EncoderModel", dict(_T5_XXL, vocab_size=256384)),
    "CompVis/ldm-text2im-large-256 text encoder": ("LDMBertModel", {}),
    "google/ddpm-celebahq-256 UNet": (
        "UNet2DModel",
        dict(
            sample_size=256,
            block_out_channels=[128, 128, 256, 256, 512, 512],
            down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        ),
    ),
    "openai/diffusers-cd_imagenet64_l2 UNet": (
        "UNet2DModel",
        dict(
            _CONSISTENCY,
            sample_size=64,
            block_out_channels=[192, 384, 576, 768],
            down_block_types=["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3,
            up_block_types=["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
            layers_per_block=3,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=1000,
        ),
    ),
    "openai/diffusers-cd_bedroom256_lpips UNet": (
        "UNet2DModel",
        dict(
            _CONSISTENCY,
            sample_size=256,
            block_out_channels=[256, 256, 512, 512, 1024, 1024],
            down_block_types=["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3,
            up_block_types=["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3,
        ),
    ),
    "amused/amused-256 transformer": ("UVit2DModel", dict(sample_size=16)),
    "amused/amused-512 transformer": ("UVit2DModel", dict(sample_size=32, downsample=True, upsample=True)),
    "facebook/DiT-XL-2-256 transformer": ("DiTTransformer2DModel", dict(out_channels=8)),
    "facebook/DiT-XL-2-512 transformer": ("DiTTransformer2DModel", dict(out_channels=8, sample_size=64)),
    "FLUX.1 dev transformer": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "FLUX.1 schnell transformer": ("FluxTransformer2DModel", {}),
    "FLUX.1 Fill dev transformer": (
        "FluxTransformer2DModel",
        dict(guidance_embeds=True, in_channels=384, out_channels=64),
    ),
    "FLUX.1 Canny dev transformer": (
        "FluxTransformer2DModel",
        dict(guidance_embeds=True, in_channels=128, out_channels=64),
    ),
    "InstantX/FLUX.1-dev-Controlnet-Union": (
        "FluxControlNetModel",
        dict(guidance_embeds=True, num_layers=5, num_single_layers=10, num_mode=10),
    ),
    "XLabs-AI/flux-controlnet-canny-diffusers": (
        "FluxControlNetModel",
        dict(
            guidance_embeds=True,
            num_layers=2,
            num_single_layers=0,
            patch_size=2,
            conditioning_embedding_channels=16,
        ),
    ),
    "FLUX.1 Redux dev image encoder": (
        "SiglipVisionModel",
        dict(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        ),
    ),
    "FLUX.1 VAE": ("AutoencoderKL", _VAE | _FLUX_VAE | dict(sample_size=1024)),
    "kakaobrain/karlo-v1-alpha prior": ("PriorTransformer", {}),
    "kakaobrain/karlo-v1-alpha decoder": (
        "UNet2DConditionModel",
        dict(
            sample_size=64,
            in_channels=3,
            out_channels=6,
            block_out_channels=[320, 640, 960, 1280],
            down_block_types=["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
            layers_per_block=3,
            cross_attention_dim=1536,
            attention_head_dim=64,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        ),
    ),
    "kakaobrain/karlo-v1-alpha super_res": (
        "UNet2DModel",
        dict(
            sample_size=256,
            in_channels=6,
            out_channels=3,
            block_out_channels=[320, 640, 960, 1280],
            down_block_types=["ResnetDownsampleBlock2D"] * 4,
            up_block_types=["ResnetUpsampleBlock2D"] * 4,
            layers_per_block=3,
            add_attention=False,
        ),
    ),
    "SD3 medium transformer": (
        "SD3Transformer2DModel",
        dict(_SD3, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192),
    ),
    "SD 3.5 medium transformer": (
        "SD3Transformer2DModel",
        dict(
            _SD3,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=list(range(13)),
            qk_norm="rms_norm",
        ),
    ),
    "SD 3.5 large transformer": (
        "SD3Transformer2DModel",
        dict(
            _SD3,
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    ),
    "SD 3.5 large ControlNet": (
        "SD3ControlNetModel",
        dict(
            pooled_projection_dim=2048,
            num_layers=19,
            num_attention_heads=38,
            joint_attention_dim=None,
            caption_projection_dim=2048,
            pos_embed_max_size=192,
            use_pos_embed=False,
            force_zeros_for_pooled_projection=False,
        ),
    ),
    "SD3 VAE": (
        "AutoencoderKL",
        dict(
            _VAE,
            sample_size=1024,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    ),
    "PixArt-alpha/PixArt-XL-2-1024-MS transformer": ("PixArtTransformer2DModel", _PIXART),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS transformer": (
        "PixArtTransformer2DModel",
        dict(_PIXART, use_additional_conditions=False),
    ),
    "stabilityai/stable-diffusion-2-1-unclip UNet": (
        "UNet2DConditionModel",
        dict(
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            sample_size=96,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2048,
        ),
    ),
}

_FLUX = {"vae": "FLUX.1 VAE", "text_encoder": "SD 1.5 text encoder", "text_encoder_2": "T5 v1.1 XXL text encoder"}
_SD3_PARTS = {
    "vae": "SD3 VAE",
    "text_encoder": "SD3 text encoder",
    "text_encoder_2": "SDXL text encoder 2",
    "text_encoder_3": "T5 v1.1 XXL text encoder",
}
# short name -> (class of the pipeline, component -> name above, settings of the pipeline)
MODELS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "sd15": (
        "StableDiffusionPipeline",
        {"vae": "SD VAE", "text_encoder": "SD 1.5 text encoder", "unet": "SD 1.5 UNet"},
        {},
    ),
    "sd21": (
        "StableDiffusionPipeline",
        {"vae": "SD VAE", "text_encoder": "SD 2.1 text encoder", "unet": "SD 2.1 UNet"},
        {},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {
            "vae": "SDXL VAE",
            "text_encoder": "SD 1.5 text encoder",
            "text_encoder_2": "SDXL text encoder 2",
            "unet": "SDXL base UNet",
        },
        {"force_zeros_for_empty_prompt": True},
    ),
    "sdxl-refiner": (
        "StableDiffusionXLImg2ImgPipeline",
        {"vae": "SDXL VAE", "text_encoder_2": "SDXL text encoder 2", "unet": "SDXL refiner UNet"},
        {"requires_aesthetics_score": True},
    ),
    "flux-dev": ("FluxPipeline", {**_FLUX, "transformer": "FLUX.1 dev transformer"}, {}),
    "flux-schnell": (
        "FluxPipeline",
        {**_FLUX, "transformer": "FLUX.1 schnell transformer"},
        {"defaults": (("num_inference_steps", 4),)},
    ),
    **{
        f"sd3{name}": ("StableDiffusion3Pipeline", {**_SD3_PARTS, "transformer": f"SD{title} transformer"}, {})
        for name, title in (("-medium", "3 medium"), ("5-medium", " 3.5 medium"), ("5-large", " 3.5 large"))
    },
    "pixart-sigma": (
        "PixArtSigmaPipeline",
        {
            "vae": "SDXL VAE",
            "text_encoder": "T5 v1.1 XXL text encoder",
            "transformer": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS transformer",
        },
        {},
    ),
    **{
        f"dit-{side}": (
            "DiTPipeline",
            {"vae": "SD VAE", "transformer": f"facebook/DiT-XL-2-{side} transformer"},
            {},
        )
        for side in (256, 512)
    },
}
