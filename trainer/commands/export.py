"""A run's network for other programs: ONNX, torch.export or its weights, compared with the run before it is kept."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint, loop, weights
from ..config import UserError, as_dict, expect_number, option
from ..methods import Method
from . import Trained, load, new_file

SUFFIXES = (".onnx", ".pt2", ".safetensors")
#: Images -> logits (N, L) and, with maps, (N, L, H, W).
Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Options:
    """a run's network as ONNX or as a torch.export program, or its weights as safetensors"""

    checkpoint: str = option("", "a run's folder, or its best.pt or last.pt", positional=True)
    out: str = option("", f"the new file, which ends with {', '.join(SUFFIXES)}", positional=True)
    pixels: bool = option(True, "it takes uint8 RGB (N, h, w, 3); else float32 (N, 3, h, w) that you normalise")
    flip: bool = option(False, "it averages its outputs for an image and for its mirror image")
    maps: bool = option(True, "it returns class activation maps too, where the method has them")
    tolerance: float = option(1e-4, "largest difference from the run's outputs, relative to the largest of them")
    overwrite: bool = option(False, "replace the file")

    def __post_init__(self) -> None:
        expect_number("tolerance", self.tolerance, 0)
        if self.out and Path(self.out).suffix.lower() not in SUFFIXES:
            raise UserError(f"out: got {self.out!r}, expected a name that ends with {', '.join(SUFFIXES)}")

    def run(self) -> int:
        out = new_file(self.out, self.overwrite)
        suffix = out.suffix.lower()
        if suffix == ".onnx" and not all(find_spec(name) for name in ("onnxscript", "onnxruntime")):
            raise UserError("out: an ONNX file needs the packages onnxscript and onnxruntime")
        trained = load(self.checkpoint, "cpu")
        if suffix == ".safetensors":
            weights.save(out, trained.method.state_dict(), _texts(_origin(trained) | _about(trained)))
            print(f"{out}: the weights of {trained.about}")
            return 0
        method = trained.method.to(memory_format=torch.contiguous_format)
        method.backbone.amp, method.backbone.layout = None, torch.contiguous_format
        network = Network(method, self.pixels, self.flip, self.maps and _has_maps(method, trained.config.image_size))
        about = _about(trained) | {"input": network.takes, "flip": self.flip}
        content, again = (_onnx if suffix == ".onnx" else _program)(network.eval(), about)
        worst = _difference(network, again)
        said = f"its outputs differ from those of the run by up to {worst:.1e} of the largest"
        if not worst <= self.tolerance:
            raise UserError(f"tolerance: got {self.tolerance:g}, but {said}: nothing is written")
        with checkpoint.replacing(out) as file:
            file.write(content)
        print(f"{out}: {' and '.join(network.names)} of {trained.about}; {said}")
        return 0


class Network(nn.Module):
    """A method that classifies images as its user has them, in float32."""

    def __init__(self, method: Method, pixels: bool, flip: bool, maps: bool) -> None:
        super().__init__()
        self.method, self.pixels, self.flip = method, pixels, flip
        self.names = ("logits", "maps") if maps else ("logits",)
        self.takes = "uint8 RGB (N, h, w, 3)" if pixels else "float32 RGB (N, 3, h, w), (pixel / 255 - mean) / std"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = self._normalised(images) if self.pixels else images
        if not self.flip:
            return self._outputs(images)
        n = images.shape[0]
        logits, *maps = self._outputs(torch.cat([images, images.flip(-1)]))
        return (logits[:n] + logits[n:]) / 2, *((m[:n] + m[n:].flip(-1)) / 2 for m in maps)

    def _normalised(self, images: Tensor) -> Tensor:
        backbone = self.method.backbone
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
        return (images.permute(0, 3, 1, 2) / 255 - mean) / std

    def _outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        method, kind = self.method, type(self.method)
        if len(self.names) == 1:
            return (method(images),)
        if kind.forward is Method.forward and kind.maps is Method.maps:  # the features are computed once
            features = method.backbone(images)
            return method.head(features), method.head.maps(features)
        return method(images), method.maps(images)


@torch.no_grad()
def _has_maps(method: Method, image_size: int) -> bool:
    try:
        method.eval().maps(torch.zeros(1, 3, image_size, image_size))
    except UserError as error:
        print(f"note: logits only: {error}")
        return False
    return True


def _about(trained: Trained) -> dict:
    """What a user of the file must know."""
    backbone = trained.method.backbone
    about = {"classes": trained.classes, "image_size": trained.config.image_size, "colours": "RGB"}
    return about | {"mean": backbone.mean, "std": backbone.std, "run": trained.about}


def _origin(trained: Trained) -> dict:
    """By which another run can start from the file."""
    return trained.method.backbone.origin | {"sha256": weights.digest(trained.file), "config": as_dict(trained.config)}


def _texts(about: dict) -> dict[str, str]:
    """With JSON for what is no text."""
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in about.items()}


def _exported(network: Network) -> torch.export.ExportedProgram:
    """Of any number of images, but for one: a batch of one would be taken for the rule."""
    return torch.export.export(
        network, (_taken(network, _pixels(network.method, 2)),), dynamic_shapes={"images": {0: _BATCH}}
    )


_BATCH = torch.export.Dim("batch")


def _program(network: Network, about: dict) -> tuple[bytes, Run]:
    """The bytes of a .pt2 file with ``about`` inside as about.json, and what they do when they are read again."""
    file = io.BytesIO()
    text = json.dumps(about, ensure_ascii=False, indent=1)
    torch.export.save(_exported(network), file, extra_files={"about.json": text})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _onnx(network: Network, about: dict) -> tuple[bytes, Run]:
    """The bytes of an ONNX file with ``about`` as its metadata, and what onnxruntime makes of them."""
    import onnxruntime

    shapes = {"images": {0: _BATCH}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            network, (_taken(network, _pixels(network.method, 2)),), dynamic_shapes=shapes, input_names=["images"],
            output_names=network.names, verbose=False,
        )  # fmt: skip
    assert made is not None, "the exporter with dynamo returns it"
    made.model.metadata_props.update(_texts(about))
    content = made.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def _pixels(method: Method, n: int) -> Tensor:
    """Random images (n, h, w, 3) uint8."""
    size = method.backbone.image_size
    return torch.randint(0, 256, (n, size, size, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


def _taken(network: Network, pixels: Tensor) -> Tensor:
    """Images as the network takes them."""
    return pixels if network.pixels else network.method.backbone.views(pixels, both=False).contiguous()


@torch.no_grad()
def _difference(network: Network, again: Run) -> float:
    """The largest between the outputs that were written and those of the run's own evaluation, relative to these.

    The run's own evaluation normalises with ``rk.paired_views`` and takes other numbers of images than the export.
    """
    method, found = network.method, []
    for n in (1, 3):
        images = _pixels(method, n)
        expected = [loop.logits(method, images, flip=network.flip)]
        if len(network.names) > 1:
            maps = method.maps(method.backbone.views(images, both=network.flip)).chunk(1 + network.flip)
            expected.append(torch.stack([maps[0], *(m.flip(-1) for m in maps[1:])]).mean(0))
        for a, b in zip(again(_taken(network, images)), expected, strict=True):
            assert a.shape == b.shape
            found.append((a - b).abs().max() / b.abs().max())
    return torch.stack(found).max().item()  # not a number if one of them is none
