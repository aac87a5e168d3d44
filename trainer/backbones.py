"""timm backbones whose logits are linear in the mean of the last feature maps, so that the CAM of Eq. 2 is exact."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import weights
from .config import Config, UserError, expect, logger, one_line

EXACT = "a model with exact class activation maps, such as resnet18, mobilenetv2_100, swin_tiny_patch4_window7_224"
#: Options of timm.create_model that the classifier's replacement makes meaningless.
WITHOUT_EFFECT = ("num_classes", "global_pool", "drop_rate", "in_chans")


class Backbone(nn.Module):
    """Images (M, 3, h, w) to features (M, C, H, W); NHWC models (Swin) come out as a channels_last view.

    A grey image (M, 1, h, w) is repeated for the three colours.
    """

    # timm's model is Any: nn.Module does not declare what all of its models have.
    def __init__(self, model: Any, config: Config, recipe: weights.Recipe) -> None:
        super().__init__()
        self.model = model
        own = model.pretrained_cfg
        #: What the weights expect, for each colour or one for all: (pixel / 255 - mean) / std.
        self.mean = tuple(value / recipe.white for value in recipe.mean or own["mean"])
        self.std = tuple(value / recipe.white for value in recipe.std or own["std"])
        self.origin: dict = {}  #: of its weights, for a checkpoint
        self.nhwc = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        self.layout = torch.channels_last if config.compute.channels_last else torch.contiguous_format
        self.image_size = config.image_size
        self.amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.compute.amp)
        self.frozen_batchnorm, self.separate_views = config.backbone.frozen_batchnorm, config.backbone.separate_views
        self.channels: int = model.num_features
        self.map_size: tuple[int, ...] = ()  #: H, W of the features
        self.frozen: tuple[str, ...] = ()  #: parts of the model that do not train, in order
        self.trained: tuple[str, ...] = ()  #: those after them; both are empty if all trains

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            return self.maps(images)

    def maps(self, images: Tensor) -> Tensor:
        """The features of images, or of what :meth:`activations` made of them, in the precision of the weights."""
        if not self.trained:
            features = self.model.forward_features(images.expand(-1, 3, -1, -1).contiguous(memory_format=self.layout))
        else:
            features = self.activations(images) if images.shape[1] in (1, 3) else images
            for name in self.trained:
                features = self.model.get_submodule(name)(features)
        return features.permute(0, 3, 1, 2) if self.nhwc else features

    @torch.no_grad()
    def activations(self, images: Tensor) -> Tensor:
        """What the frozen parts make of images (M, 1 or 3, h, w)."""
        x = images.expand(-1, 3, -1, -1).contiguous(memory_format=self.layout)
        for name in self.frozen:
            x = self.model.get_submodule(name)(x)
        return x

    def freeze(self, before: str) -> None:
        """The parts of the model before the one called ``before`` keep their weights and statistics.

        Raises:
            UserError: no such part, or the model is more than its parts one after the other.
        """
        names = _parts(self.model)
        first = next((i for i, n in enumerate(names) if n == before or n.startswith(f"{before}.")), 0)
        expect(first > 0, "backbone.train_from", before, f"one of {', '.join(names[1:])}")
        images = torch.randn(2, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0))
        self.eval()
        with torch.no_grad():
            whole = self.maps(images)
            self.frozen, self.trained = names[:first], names[first:]
            same = torch.allclose(self.maps(images), whole, atol=1e-4 * float(whole.abs().max()))
        expect(same, "backbone.train_from", before, "a part before which this model can be taken apart")
        for name in self.frozen:
            self.model.get_submodule(name).requires_grad_(False)

    def pair(self, images: Tensor) -> Tensor:
        """Of both views (2N, 3, h, w), in one pass, or in one for each so that BatchNorm does not mix them."""
        return torch.cat([self(view) for view in images.chunk(2)]) if self.separate_views else self(images)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name in self.frozen:
            self.model.get_submodule(name).eval()
        for module in self.modules():
            if self.frozen_batchnorm and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def create(config: Config, origin: dict | None = None) -> Backbone:
    """The timm backbone that ``config`` names, without its classifier, after checking that its CAM is exact.

    In eval mode, ``model(x)`` must be W . mean_hw(forward_features(x)) + b with its own classifier W, b, which gets
    random values here because some models start it at zero. It starts from the weights that ``config`` names, or else
    random by ``config.seed``; PyTorch's own generator is left as it was.

    Args:
        origin: what a checkpoint keeps of the weights that its model started from; no file is read then.

    Raises:
        UserError: timm can't build the model, something stands between the last maps and the classifier, or the
        weights don't fit.
    """
    options = dict(config.backbone.options)
    pretrained, start = options.pop("pretrained", False), None
    alone = not (pretrained and config.backbone.weights)
    expect(alone, "backbone.options", config.backbone.options, "no pretrained beside backbone.weights")
    if origin is None and config.backbone.weights:
        start = weights.read(weights.locate(config.backbone.weights))
        origin = start.origin
    elif origin is None:
        origin, options["pretrained"] = {"recipe": "timm" if pretrained else "scratch"}, pretrained
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        backbone = _create(config, options, weights.recipe(origin.get("recipe", "scratch")))
    backbone.origin = origin
    if start:
        tensors, said = weights.fitted(backbone.model, start)
        backbone.model.load_state_dict(tensors, strict=False)
        logger.info("weights: %s", said)
    if config.backbone.train_from:
        backbone.freeze(config.backbone.train_from)
    return backbone.train()


def _create(config: Config, options: dict, recipe: weights.Recipe) -> Backbone:
    name, image_size = config.backbone.name, config.image_size
    expect(name in timm.list_models(), "backbone", name, "a model of timm (see timm.list_models())")
    expect(recipe.model in ("", name), "backbone", name, f"{recipe.model}, which the weights are of")
    if useless := sorted(set(options) & set(WITHOUT_EFFECT)):
        raise UserError(f"backbone.options: got {useless[0]}, which has no effect: the classifier is replaced")
    lacking = {key: value for key, value in recipe.needs.items() if options.get(key) != value}
    expect(not lacking, "backbone.options", config.backbone.options, f"{lacking} too, which the weights need")
    try:
        model: Any = timm.create_model(name, num_classes=5, **options)
    except Exception as error:  # whatever timm, or the download that "pretrained" asks for, makes of the options
        got = f"got {config.backbone.options} for {name!r}"
        raise UserError(f"backbone.options: {got}, which timm refuses: {one_line(error)}") from error
    recipe.prepare(model)
    backbone = Backbone(model, config, recipe).eval()
    classifier = model.get_classifier()
    linear = isinstance(classifier, nn.Linear)
    expect(linear, "backbone", name, f"{EXACT}: its classifier is {type(classifier).__name__}, not Linear")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(generator=random)
        images = torch.randn(2, 3, image_size, image_size, generator=random)
        try:
            features, logits = backbone.maps(images), model(images)
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"image_size: got {image_size}, which {name!r} refuses: {one_line(error)}") from error
        shape, width = tuple(features.shape), classifier.in_features
        is_maps = len(shape) == 4 and shape[1] == width
        expect(is_maps, "backbone", name, f"{EXACT}: its features are {shape}, not maps (M, {width}, H, W)")
        off = ((logits - classifier(features.mean((2, 3)))).norm() / logits.norm()).item()
    expect(off < 1e-4, "backbone", name, f"{EXACT}: its logits differ from W . GAP(features) + b by {off:.0%}")
    single = config.batch_size == 1 and shape[2:] == (1, 1)
    expect(not single, "batch_size", 1, f"at least 2: the last map of {name!r} is a single pixel")
    model.reset_classifier(0)
    backbone.channels, backbone.map_size = shape[1], shape[2:]
    return backbone


#: What of a timm model comes after its last maps.
AFTER = ("global_pool", "head_drop", "fc", "classifier", "head")


def _parts(model: Any) -> tuple[str, ...]:
    """The names of its modules in the order of their computation, sequences taken apart."""

    def taken_apart(name: str, module: nn.Module) -> list[str]:
        if not isinstance(module, nn.Sequential):
            return [name]
        return [part for key, child in module.named_children() for part in taken_apart(f"{name}.{key}", child)]

    children = ((name, child) for name, child in model.named_children() if name not in AFTER)
    return tuple(part for name, child in children for part in taken_apart(name, child))
