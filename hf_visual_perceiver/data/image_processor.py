"""The image processor of a checkpoint, created from its config."""

from transformers import ViTImageProcessor

from hf_visual_perceiver.modeling import ElasticConfig


# PIL's numbers, as in preprocessor_config.json, of timm's resampling filters.
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def create_image_processor(config: ElasticConfig) -> ViTImageProcessor:
    """Create a processor that prepares images as timm does for the same checkpoint.

    Raises:
        ValueError: If the config names an interpolation that timm does not know.
    """
    cfg = config.timm_pretrained_cfg
    if cfg["interpolation"] not in RESAMPLING:
        raise ValueError(f"Expected interpolation to be one of {', '.join(RESAMPLING)}, got {cfg['interpolation']!r}.")
    height, width = config.image_height_width
    return ViTImageProcessor(
        size={"height": height, "width": width},
        resample=RESAMPLING[cfg["interpolation"]],
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
        do_convert_rgb=config.num_channels == 3,
    )
