"""A file of weights as safetensors under timm's names, with where it came from and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from .. import weights
from ..config import UserError, option
from . import new_file, one_line


@dataclass(frozen=True)
class Options:
    """a file of weights, ONNX too, as safetensors under timm's names"""

    source: str = option("", "the file, see docs/weights.md", positional=True)
    out: str = option("", "the new file, which ends with .safetensors", positional=True)
    model: str = option("", "timm model, where the file's origin does not say which")
    options: dict = option({}, "for timm.create_model, such as '{patch_size: 2}'")
    overwrite: bool = option(False, "replace the new file")

    def run(self) -> int:
        if not self.out.endswith(".safetensors"):
            raise UserError(f"out: got {self.out!r}, expected a name that ends with .safetensors")
        source, out = weights.locate(self.source), new_file(self.out, self.overwrite)
        if source.suffix.lower() == ".onnx":
            found = weights.recognised(source, onnx_tensors(source))
        else:
            found = weights.read(source)
        recipe = weights.recipe(found.recipe)
        name = recipe.model or self.model
        if name not in timm.list_models():
            raise UserError(f"model: got {name!r}, expected a model of timm: {source} does not say which it is of")
        model: Any = timm.create_model(name, num_classes=0, **dict(recipe.needs), **self.options)
        recipe.prepare(model)
        tensors, said = weights.fitted(model, found)
        about = {"model": name, "what": recipe.what, "licence": recipe.licence, "source": source.name}
        weights.save(out, tensors, {**found.origin, **about})
        again, _ = weights.fitted(model, weights.read(out))
        assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
        print(f"{said}\n{out}: {recipe.what}; {name}; licence: {recipe.licence}")
        return 0


def onnx_tensors(path: Path) -> weights.Tensors:
    """What the layers of an ONNX model compute with, dequantised: name of a layer's output and kind of the tensor.

    Raises:
        UserError: no ONNX model, or the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("source: an ONNX model needs the package onnx: pip install onnx") from None
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:
        raise UserError(f"source: got {path}, which is no ONNX model: {one_line(error)[:200]}") from error
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors = {}
    for node in graph.node:
        values: list[Any] = [known.get(name) for name in node.input]
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        first = values[0] if values else None  # a Constant has no input
        if first is not None and settings.get("block_size"):
            _, scale, zero = values
            known[node.output[0]] = _dequantised(first, scale, zero, settings["axis"], settings["block_size"])
        elif first is not None and node.op_type == "Reshape":
            known[node.output[0]] = first.reshape(values[1])
        for kind, value in zip(KINDS.get(node.op_type, ()), values[1:], strict=False):
            if value is not None:
                slopes = node.op_type == "PRelu"  # (C, 1, 1)
                tensors[f"{node.output[0]}.{kind}"] = torch.from_numpy(value.flatten() if slopes else value.copy())
    return tensors


#: PyTorch's names of a layer's inputs after the first.
KINDS = {
    "Conv": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
    "PRelu": ("weight",),
}


def _dequantised(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int, block: int) -> np.ndarray:
    """(x - zero) * scale, which have one value for each ``block`` values of ``x`` along ``axis``."""
    scale, zero = (v.repeat(block, axis).take(range(x.shape[axis]), axis).astype(np.float32) for v in (scale, zero))
    return (x.astype(np.float32) - zero) * scale
