"""Networks from images to features: built here, of torchvision and timm, and trunks of detectors."""

from fewshot.backbones.networks import build, of

__all__ = ["build", "of"]
