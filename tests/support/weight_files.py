"""Files of weights as people have them, made of random tensors, and what a backbone that starts from one computes."""

import dataclasses
import io
import pickle
import struct

import timm
import torch
from torch import nn
from torch.nn import functional as F

from trainer import backbones
from trainer.config import Backbone
from trainer.data.views import views
from trainer.presets import baseline

TINY = {"channels": [8, 8, 8, 8]}  #: of a ResNet


def config(path, name, options=(), size=64):
    return dataclasses.replace(baseline(), image_size=size, backbone=Backbone(name, dict(options), weights=str(path)))


def create(path, name, options=(), size=64):
    return backbones.create(config(path, name, options, size)).eval()


def randomised(model, seed=0):
    """With statistics and factors that make every layer count; eval mode."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=random)
            module.bias.data.normal_(0, 0.2, generator=random)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2, generator=random)
            module.running_var.uniform_(0.5, 1.5, generator=random)
    return model.eval()


def pixels(size=64, n=2):
    return torch.randint(0, 256, (n, size, size, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@torch.no_grad()
def features(backbone, images):
    """Of uint8 images (N, h, w, 3), normalised as the backbone wants it."""
    return backbone(views(images, backbone, both=False))


def normalised(images, mean, std):
    """(N, 3, h, w) float32, by hand."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def assert_near(got, expected, tolerance=1e-5):
    assert expected.std() > 1e-3, "the truth says something"
    assert got.shape == expected.shape
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < tolerance, error


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Python2(pickle._Pickler):
    """Writes text and bytes as Python 2 does: one kind of string, in latin 1."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        raw = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string


def python2(content):
    """The pickle of a dict of arrays as the oldest numpy wrote it."""
    file = io.BytesIO()
    Python2(file, 2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def caffe_tensors():
    """Random ones of a thin ResNet-50, as the converted Caffe model has them."""
    model = randomised(timm.create_model("resnet50", num_classes=9, **TINY))
    return {n: t.clone() for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}


def lite0_blocks():
    """Stride, kernel, expansion and channels of EfficientNet-Lite0's 16 blocks."""
    rows = [(1, 1, 3, 1, 16), (2, 2, 3, 6, 24), (2, 2, 5, 6, 40), (3, 2, 3, 6, 80)]
    rows += [(3, 1, 5, 6, 112), (4, 2, 5, 6, 192), (1, 1, 3, 6, 320)]
    return [(stride if i == 0 else 1, *rest) for n, stride, *rest in rows for i in range(n)]


def lite0(tensors, x):
    """EfficientNet-Lite0 as TensorFlow pads: as little as keeps n / stride positions, the odd pixel at the end."""

    def conv_bn(x, conv, bn, stride=1):
        weight = tensors[f"{conv}.weight"]
        for axis in (3, 2):
            n, k = x.shape[axis], weight.shape[axis]
            pad = max(0, (-(-n // stride) - 1) * stride + k - n)
            x = F.pad(x, (pad // 2, pad - pad // 2, 0, 0) if axis == 3 else (0, 0, pad // 2, pad - pad // 2))
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(tensors[f"{bn}.{k}"] for k in keys), eps=1e-3)

    x = F.relu6(conv_bn(x, "_conv_stem", "_bn0", 2))
    for i, (stride, _, expansion, _) in enumerate(lite0_blocks()):
        name = f"_blocks.{i}"
        y = x if expansion == 1 else F.relu6(conv_bn(x, f"{name}._expand_conv", f"{name}._bn0"))
        y = F.relu6(conv_bn(y, f"{name}._depthwise_conv", f"{name}._bn1", stride))
        y = conv_bn(y, f"{name}._project_conv", f"{name}._bn2")
        x = x + y if x.shape == y.shape else y
    return F.relu6(conv_bn(x, "_conv_head", "_bn1"))
