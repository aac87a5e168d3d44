"""timm backbones whose logits are a linear function of the pooled last feature maps, so that Eq. 2 is exact."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """Images (M, 3, h, w) -> features (M, C, H, W); NHWC models come out as channels_last."""

    def __init__(self, name: str, options: dict) -> None:
        super().__init__()
        if name not in timm.list_models():
            raise ValueError(f"backbone: got {name!r}, expected a model of timm")
        self.model = timm.create_model(name, num_classes=0, **options)
        self.nhwc = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        self.channels = self.model.num_features

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.forward_features(images.expand(-1, 3, -1, -1))
        return features.permute(0, 3, 1, 2) if self.nhwc else features


def create(name: str, image_size: int, options: dict) -> Backbone:
    """The backbone, after a numerical check that its own pooled output is the mean of its last maps.

    Raises:
        ValueError: an unknown name, or a model with something between the last maps and the classifier.
    """
    backbone = Backbone(name, options).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        features = backbone(images)
        if features.dim() != 4:
            raise ValueError(f"backbone: got {name!r} whose features have shape {tuple(features.shape)}, expected maps")
        expected = features.mean((2, 3))
        pooled = backbone.model(images)
        if pooled.shape != expected.shape or not torch.allclose(pooled, expected, rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"backbone: got {name!r}, whose classifier does not see the mean of its last maps (a layer follows "
                "the pooling), expected one with an exact linear CAM, such as resnet18"
            )
    return backbone.train()
