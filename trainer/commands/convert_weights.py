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
            found = weights.recognised(source, onnx_tensors(source), "onnx")
        else:
            found = weights.read(source)
        recipe = weights.recipe(found.recipe)
        name = recipe.model or self.model
        if name not in timm.list_models():
            raise UserError(f"model: got {name!r}, expected a model of timm: {source} does not say which it is of")
        model: Any = timm.create_model(name, num_classes=0, **dict(recipe.options), **self.options)
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
        values = [known.get(name) for name in node.input]
        if node.op_type in FOLDED and all(value is not None for value in values):
            settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            known[node.output[0]] = FOLDED[node.op_type](*values, **settings)
        for kind, value in zip(KINDS.get(node.op_type, ()), values[1:], strict=False):
            if value is not None:
                flat = value.reshape(-1) if node.op_type == "PRelu" else value
                tensors[f"{node.output[0]}.{kind}"] = torch.from_numpy(flat.copy())
    return tensors


#: PyTorch's names of a layer's inputs after the first.
KINDS = {
    "Conv": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
    "PRelu": ("weight",),
}


def _dequantised(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, axis: int = 1, block_size: int = 0
) -> np.ndarray:
    """(x - zero) * scale; both of the shape of ``x`` but for one value a block, of one for each index of ``axis``, or
    of one for all."""

    def spread(values: np.ndarray) -> np.ndarray:
        if block_size:
            return values.repeat(block_size, axis).take(range(x.shape[axis]), axis)
        return values.reshape([-1 if i == axis % x.ndim and values.size > 1 else 1 for i in range(x.ndim)])

    shifted = x.astype(np.float32) - (0 if zero is None else spread(zero).astype(np.float32))
    return shifted * spread(scale)


FOLDED: dict[str, Any] = {
    "DequantizeLinear": _dequantised,
    "Reshape": lambda x, shape, allowzero=0: x.reshape(shape),
}
