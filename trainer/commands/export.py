"""A run's network for other programs, as ONNX or torch.export, compared with the run before it is kept."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint, loop
from ..config import UserError, expect, expect_package, option
from ..data.views import views
from ..methods import Method
from . import load, new_file

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4  #: largest difference from the run's outputs, relative to the largest of them
SHAPES = {"images": {0: torch.export.Dim("batch")}}
#: uint8 RGB (N, h, w, 3) to logits (N, L) and, where the method has them, maps (N, L, H, W).
Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Options:
    """a run's network as ONNX or as a torch.export program: uint8 images to logits and activation maps"""

    checkpoint: str = option("", "a run's folder, or its best.pt or last.pt", positional=True)
    out: str = option("", f"the new file, which ends with {' or '.join(SUFFIXES)}", positional=True)
    overwrite: bool = option(False, "replace the file")

    def run(self) -> None:
        out, suffix = new_file(self.out, self.overwrite), Path(self.out).suffix.lower()
        expect(suffix in SUFFIXES, "out", self.out, f"a name that ends with {' or '.join(SUFFIXES)}")
        if suffix == ".onnx":
            expect_package("out", "onnxscript", "onnxruntime")
        trained = load(self.checkpoint, "cpu")
        method = trained.method.to(memory_format=torch.contiguous_format).eval()
        backbone = method.backbone
        backbone.amp, backbone.layout = None, torch.contiguous_format
        network, size = Network(method), trained.config.image_size
        about = {"input": "uint8 RGB (N, h, w, 3)", "classes": trained.classes, "image_size": size}
        about |= {"mean": backbone.mean, "std": backbone.std, "run": trained.about}
        random = torch.Generator().manual_seed(0)
        images = [torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=random) for n in (1, 2, 3)]
        content, again = (_onnx if suffix == ".onnx" else _program)(network, images[1], about)
        worst = _difference(network, again, images)
        said = f"its outputs differ from those of the run by up to {worst:.1e} of the largest"
        if not worst <= TOLERANCE:
            raise UserError(f"checkpoint: got {self.checkpoint}, but {said}, over {TOLERANCE:g}; nothing is written")
        with checkpoint.replacing(out) as file:
            file.write(content)
        print(f"{out}: {' and '.join(network.names)} of {trained.about}; {said}")


class Network(nn.Module):
    """A method that classifies uint8 RGB images (N, h, w, 3), in float32."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method, self.names = method, ["logits", "maps"]
        try:
            method.maps(torch.zeros(2, 3, *2 * [method.backbone.image_size]))
        except UserError as error:
            print(f"note: logits only: {error}")
            self.names = ["logits"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        method, kind = self.method, type(self.method)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (method.backbone.mean, method.backbone.std))
        x = (images.permute(0, 3, 1, 2) / 255 - mean) / std
        if len(self.names) == 1:
            return (method(x),)
        if kind.forward is Method.forward and kind.maps is Method.maps:  # the features are computed once
            features = method.backbone(x)
            return method.head(features), method.head.maps(features)
        return method(x), method.maps(x)


def _exported(network: Network, images: Tensor) -> torch.export.ExportedProgram:
    """Of any number of images as large as these."""
    return torch.export.export(network, (images,), dynamic_shapes=SHAPES)


def _program(network: Network, images: Tensor, about: dict) -> tuple[bytes, Run]:
    """The bytes of a .pt2 file with ``about`` inside as about.json, and what they do when they are read again."""
    file = io.BytesIO()
    torch.export.save(_exported(network, images), file, extra_files={"about.json": json.dumps(about)})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _onnx(network: Network, images: Tensor, about: dict) -> tuple[bytes, Run]:
    """The bytes of an ONNX file with ``about`` as its metadata, and what onnxruntime makes of them."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _exported(network, images)
        made = torch.onnx.export(
            program, input_names=["images"], output_names=network.names, dynamic_shapes=SHAPES, verbose=False
        )
    assert made is not None, "the exporter with dynamo returns it"
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in about.items()}
    made.model.metadata_props.update(texts)
    content = made.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


@torch.no_grad()
def _difference(network: Network, again: Run, images: list[Tensor]) -> float:
    """The largest between the outputs that were written and those of the run's own evaluation, relative to these.

    The run's own evaluation normalises with ``rk.paired_views``.
    """
    method, found = network.method, []
    for some in images:
        expected = [loop.logits(method, some)]
        if len(network.names) > 1:
            expected.append(method.maps(views(some, method.backbone, both=False)))
        for a, b in zip(again(some), expected, strict=True):
            assert a.shape == b.shape
            found.append((a - b).abs().max() / b.abs().max())
    return torch.stack(found).max().item()  # not a number if one of them is none
