"""timm backbones whose logits are linear in the mean of the last feature maps, so that the CAM of Eq. 2 is exact."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """Images (M, 3, h, w) to features (M, C, H, W); NHWC models (Swin) come out as a channels_last view.

    A grey image (M, 1, h, w) is repeated for the three colours.
    """

    def __init__(self, model: Any) -> None:  # timm's; nn.Module does not declare what all of its models have
        super().__init__()
        self.model = model
        self.nhwc = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        self.channels: int = model.num_features

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.forward_features(images.expand(-1, 3, -1, -1))
        return features.permute(0, 3, 1, 2) if self.nhwc else features


def create(name: str, image_size: int, options: dict | None = None) -> Backbone:
    """The timm backbone, without its classifier, after checking that its CAM is exact.

    In eval mode, ``model(x)`` must be W . mean_hw(forward_features(x)) + b with its own classifier W, b, which gets
    random values here because some models start it at zero.

    Raises:
        ValueError: timm can't build the model, or something stands between the last maps and the classifier.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"backbone: got {name!r}, whose class activation maps are not exact: {reason}; "
            "expected a model such as resnet18, resnet50, mobilenetv2_100, swin_tiny_patch4_window7_224"
        )

    if name not in timm.list_models():
        raise ValueError(f"backbone: got {name!r}, expected a model of timm (see timm.list_models())")
    try:
        model = timm.create_model(name, num_classes=5, **(options or {})).eval()
    except (TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"backbone_options: got {options} for {name!r}, which timm refuses: {error}") from error
    backbone = Backbone(model)
    classifier = backbone.model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise refuse(f"its classifier is {type(classifier).__name__}, not Linear")

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = torch.randn(classifier.weight.shape, generator=random)
        bias = torch.randn(len(weight), generator=random)
        classifier.weight.copy_(weight)
        if classifier.bias is not None:
            classifier.bias.copy_(bias)
        images = torch.randn(2, 3, image_size, image_size, generator=random)
        try:
            features, logits = backbone(images), model(images)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"image_size: got {image_size}, which {name!r} refuses: {error}") from error
    if features.dim() != 4:
        raise refuse(f"forward_features returns shape {tuple(features.shape)}, not maps (M, C, H, W)")
    if features.shape[1] != weight.shape[1]:
        raise refuse(f"its last maps have {features.shape[1]} channels but its classifier takes {weight.shape[1]}")
    linear = nn.functional.linear(features.mean((2, 3)), weight, None if classifier.bias is None else bias)
    off = ((logits - linear).norm() / logits.norm()).item()
    if not off < 1e-4:
        raise refuse(f"its logits differ from W . GAP(features) + b by {off:.0%}, so a layer follows the pooling")
    backbone.model.reset_classifier(0)
    backbone.channels = features.shape[1]
    return backbone.train()
