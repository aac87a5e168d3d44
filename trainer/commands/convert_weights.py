"""A file of weights as safetensors under timm's names, with where it came from and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from .. import weights
from ..config import UserError, expect, expect_package, one_line, option
from . import new_file


@dataclass(frozen=True)
class Options:
    """a file of weights, ONNX too, as safetensors under timm's names"""

    source: str = option("", "the file, see docs/weights.md", positional=True)
    out: str = option("", "the new file, which ends with .safetensors", positional=True)
    model: str = option("", "timm model, where the file's origin does not say which")
    options: dict = option({}, "for timm.create_model, such as '{patch_size: 2}'")
    overwrite: bool = option(False, "replace the new file")

    def run(self) -> None:
        expect(self.out.endswith(".safetensors"), "out", self.out, "a name that ends with .safetensors")
        source, out = weights.locate(self.source), new_file(self.out, self.overwrite)
        onnx = source.suffix.lower() == ".onnx"
        found = weights.recognised(source, onnx_tensors(source)) if onnx else weights.read(source)
        recipe = weights.recipe(found.recipe)
        name = recipe.model or self.model
        expect(name in timm.list_models(), "model", name, f"a model of timm: {source} does not say which it is of")
        model: Any = timm.create_model(name, num_classes=0, **recipe.needs, **self.options)
        recipe.prepare(model)
        tensors, said = weights.fitted(model, found)
        about = {"model": name, "what": recipe.what, "licence": recipe.licence, "source": source.name}
        weights.save(out, tensors, {**found.origin, **about})
        print(f"{said}\n{out}: {recipe.what}; {name}; licence: {recipe.licence}")


def onnx_tensors(path: Path) -> weights.Tensors:
    """What the layers of an ONNX model compute with, dequantised: name of a layer's output and kind of the tensor.

    Raises:
        UserError: no ONNX model, or the package onnx is not installed.
    """
    expect_package("source", "onnx")
    import onnx
    from onnx.reference import ReferenceEvaluator

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise UserError(f"source: got {path}, which is no ONNX model: {one_line(error)}") from error
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    tensors = {}
    for node in model.graph.node:
        if known.keys() >= set(node.input):  # such as weights that are dequantised and reshaped
            inputs = {name: known[name] for name in node.input}
            outputs: Any = ReferenceEvaluator(node, opsets=opsets).run(None, inputs)
            known |= zip(node.output, outputs, strict=True)
        for kind, name in zip(KINDS.get(node.op_type, ()), node.input[1:], strict=False):
            if name in known:
                value = known[name].flatten() if node.op_type == "PRelu" else known[name].copy()  # slopes: (C, 1, 1)
                tensors[f"{node.output[0]}.{kind}"] = torch.from_numpy(value)
    return tensors


#: PyTorch's names of a layer's inputs after the first.
PAIR = ("weight", "bias")
KINDS = {"Conv": PAIR, "Gemm": PAIR, "BatchNormalization": (*PAIR, "running_mean", "running_var"), "PRelu": PAIR[:1]}
