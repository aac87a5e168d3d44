"""Files of weights: which one it is, what a model needs to compute what it was trained for, and how much of it matched.

A file is recognised by its content and brings a :class:`Recipe`: the timm model, changes to that model, and how images
are normalised. Reading runs no code of a file. A checkpoint of a run keeps the recipe's name, so that the model can be
made again without the file.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .checkpoint import replacing
from .config import UserError, expect, listed, one_line, spelt

Tensors = dict[str, Tensor]

LEAST = 0.9  #: share of the tensors of the model and the file together that must match
FOLDER = Path(__file__).parents[1] / "weights"  #: of files that a name stands for, as `make weights` fills it


@dataclass(frozen=True)
class Recipe:
    """What the weights of one origin need, and how their files are recognised: a table of weights.toml."""

    what: str  #: they were trained for
    licence: str = "that of its authors"
    model: str = ""  #: of timm; "" for any
    mean: Sequence[float] = ()  #: of the pixels, RGB or one for all; () for what timm says for its own weights
    std: Sequence[float] = ()  #: likewise
    white: float = 1.0  #: largest value of a pixel for which these two are meant
    has: Sequence[str] = ()  #: tensors that tell its files from others; "name 8" has 8 rows
    lacks: Sequence[str] = ()  #: tensors that they do not have
    drop: Sequence[str] = ()  #: starts of the names of layers that a classifier of its own replaces
    needs: dict = field(default_factory=dict)  #: options of timm.create_model
    bgr: str = ""  #: the convolution whose input has blue first, which is turned round
    change: str = ""  #: to the model, of :data:`CHANGES`
    rename: str = ""  #: to timm's names, of :data:`RENAMES`

    def knows(self, tensors: Tensors) -> bool:
        """Whether a file with these tensors is of this origin."""
        seen = {*tensors, *(f"{name} {len(tensor)}" for name, tensor in tensors.items() if tensor.ndim)}
        return bool(self.has) and seen.issuperset(self.has) and seen.isdisjoint(self.lacks)

    def prepare(self, model: Any) -> None:
        """Changes a timm model into that of the weights."""
        if self.change:
            CHANGES[self.change](model)


def _caffe(model: Any) -> None:
    """The strides and the padding of Caffe's ResNet-50: stride 2 in the first convolution of a stage."""
    model.maxpool = nn.MaxPool2d(3, 2, padding=0, ceil_mode=True)
    for stage in (model.layer2, model.layer3, model.layer4):
        first = stage[0]
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride


def _sface(model: Any) -> None:
    """SFace's MobileNetV1: no stride at the stem, a PReLU for each channel, one more BatchNorm at the end."""
    model.conv_stem.stride = (1, 1)
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.eps = 1e-3
            module.act = nn.PReLU(module.num_features)
    model.bn2 = nn.BatchNorm2d(model.num_features, eps=2e-5)


def _swin(tensors: Tensors, model: nn.Module) -> Tensors:
    """Names of the first Swin program: its stages end with the patch merging that timm's begin with."""
    made = ("relative_position_index", "attn_mask")  # computed by the model
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(made)
    }


def _in_order(tensors: Tensors, model: nn.Module) -> Tensors:
    """The model's names for tensors that come in its order; their kinds (weight, running_mean) must agree."""
    ours, theirs = ([name for name in names if _counts(name)] for names in (model.state_dict(), tensors))
    if [name.rpartition(".")[2] for name in ours] != [name.rpartition(".")[2] for name in theirs]:
        raise UserError(f"backbone.weights: got {len(theirs)} tensors, expected the {len(ours)} of its model in order")
    return {name: tensors[theirs[i]] for i, name in enumerate(ours)}


CHANGES: dict[str, Callable[[Any], None]] = {"caffe": _caffe, "sface": _sface}
RENAMES: dict[str, Callable[[Tensors, nn.Module], Tensors]] = {"swin": _swin, "in_order": _in_order}


#: By name, which a checkpoint and a converted file keep.
RECIPES = {name: Recipe(**t) for name, t in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()}


class Weights(NamedTuple):
    """What a file holds."""

    path: Path
    tensors: Tensors
    recipe: str  #: a key of :data:`RECIPES`
    converted: bool  #: whether names and colours are timm's already
    sha256: str  #: of the file, or of that from which it was converted

    @property
    def origin(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"recipe": self.recipe, "sha256": self.sha256}


def recipe(name: str) -> Recipe:
    """The recipe of that name, which a file or a checkpoint has."""
    expect(name in RECIPES, "backbone.weights", name, f"one of the recipes {', '.join(RECIPES)}")
    return RECIPES[name]


def locate(text: str) -> Path:
    """A file, or the converted one that a name such as sface stands for: in $REBALFER_WEIGHTS, or else in weights.

    Raises:
        UserError: there is none.
    """
    folder = Path(os.environ.get("REBALFER_WEIGHTS", FOLDER)).expanduser()
    path = Path(text).expanduser()
    if path.name == text and not path.is_file():  # a path that is missing is no name
        path = folder / f"{spelt(text)}.safetensors"
    names = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none; `make weights` makes some"
    expect(path.is_file(), "backbone.weights", text, f"a file or a name of {folder} ({names})")
    return path


def read(path: Path) -> Weights:
    """The tensors of a file, and which they are.

    Raises:
        UserError: a file that can't be read without running its code, or that no recipe can use.
    """
    command = f"python -m trainer convert-weights {path} {path.with_suffix('.safetensors')}"
    expect(path.suffix.lower() != ".onnx", "backbone.weights", str(path), f"it converted: {command}")
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
            file.seek(0)
            if start[8:9] == b"{":
                return _safetensors(path)
            if start[:1] == b"\x80" and start != LEGACY:
                arrays = _Arrays(file, encoding="latin1").load()
                found = recognised(path, {name: torch.from_numpy(array) for name, array in arrays.items()})
                return found._replace(recipe="vggface2_resnet50")  # the one such file
            return _torch(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"backbone.weights: got {path}, which can't be read: {error.strerror}") from error
    except Exception as error:  # whatever a damaged or foreign file makes of its reader
        raise UserError(f"backbone.weights: got {path}: {_refusal(error)}") from error


def _safetensors(path: Path) -> Weights:
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if {"recipe", "sha256"} <= about.keys():  # written by this program
        return Weights(path, _stripped(tensors), about["recipe"], True, about["sha256"])
    return recognised(path, tensors)


def _torch(path: Path) -> Weights:
    content = torch.load(path, weights_only=True, map_location="cpu")
    if {"config", "identity", "model"} <= content.keys():  # a checkpoint of a run
        about = {"recipe": "scratch", **content.get("weights", {})}
        return Weights(path, _stripped(content.get("average") or content["model"]), about["recipe"], True, digest(path))
    content = next((content[key] for key in INSIDE if isinstance(content.get(key), dict)), content)
    return recognised(path, {str(n): t.detach() for n, t in content.items() if isinstance(t, Tensor)})


def recognised(path: Path, tensors: Tensors) -> Weights:
    """Tensors under the names of their program, with the recipe that knows them."""
    tensors = _stripped(tensors)
    if "input_layer.0.weight" in tensors:
        raise UserError(f"backbone.weights: got {path}: the IR network of face.evoLVe, which timm has no model for")
    known = next((name for name, r in RECIPES.items() if r.knows(tensors)), "timm")
    return Weights(path, tensors, known, False, digest(path))


def digest(path: Path) -> str:
    """sha256 of the file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def changed(text: str, origin: dict) -> bool:
    """Whether ``backbone.weights`` says something else than what a run started from; a file that is gone may be so."""
    if not text or "sha256" not in origin:
        return bool(text) != ("sha256" in origin)
    try:
        path = locate(text)
    except UserError:
        return False
    return read(path).sha256 != origin["sha256"]


def fitted(model: Any, weights: Weights) -> tuple[Tensors, str]:
    """Those of a timm model without classifier, which their recipe has prepared, and what matched, in words.

    Raises:
        UserError: less than 90 % matches, or a tensor has another shape.
    """
    of, classifier = RECIPES[weights.recipe], model.pretrained_cfg.get("classifier") or ()
    drop = tuple(of.drop) or tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    dropped = [name for name in weights.tensors if name.startswith(drop)]
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in dropped}
    if not weights.converted:
        tensors = RENAMES[of.rename](tensors, model) if of.rename else tensors
        if of.bgr in tensors:
            tensors[of.bgr] = tensors[of.bgr].flip(1)
    ours, theirs = ({n: tuple(t.shape) for n, t in x.items() if _counts(n)} for x in (model.state_dict(), tensors))
    matched = [n for n in ours if ours[n] == theirs.get(n)]
    others = {
        "missing": [n for n in ours if n not in theirs],
        "unexpected": [n for n in theirs if n not in ours],
        "of another shape": [f"{n} {theirs[n]}, not {ours[n]}" for n in ours if ours[n] != theirs.get(n, ours[n])],
        "left out": dropped,
    }
    share = len(matched) / max(1, len(ours | theirs))
    notes = [f"{len(names)} {what}: {listed(names, 4)}" for what, names in others.items() if names]
    said = "; ".join([f"{weights.path} ({of.what}): {len(matched)} tensors match ({share:.1%})", *notes])
    if others["of another shape"] or share < LEAST:
        raise UserError(f"backbone.weights: got {said}; expected at least {LEAST:.0%} in the same shapes")
    return {name: tensor for name, tensor in tensors.items() if name in model.state_dict()}, said


def _counts(name: str) -> bool:
    """Whether a tensor takes part in the match: counters of batches are needed by no result."""
    return not name.endswith("num_batches_tracked")


#: What some programs put in front of all names; ours is the second.
PREFIXES = ("module.", "backbone.model.", "backbone.")


def _stripped(tensors: Tensors) -> Tensors:
    """Without the prefix of a wrapper; what stands outside the wrapped network is left out."""
    for prefix in PREFIXES:
        if inside := {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}:
            tensors = inside
    return tensors


#: Where programs keep the state dict of the network among other things.
INSIDE = ("state_dict", "state_dict_backbone", "model_state_dict", "model")
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  #: how torch.save began before it wrote zip files


class _Arrays(pickle.Unpickler):
    """A pickle of nothing but numpy arrays by name, as Python 2 wrote it; anything else is refused, not run."""

    ALLOWED: dict[str, Any] = {
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],  # what makes an array for its pickle
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "collections.OrderedDict": OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (known := f"{module}.{name}".replace("numpy._core", "numpy.core")) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"Unsupported global: {module}.{name}")
        return self.ALLOWED[known]


def _refusal(error: Exception) -> str:
    """Why a file was not read."""
    if names := re.findall(r"nsupported (?:global: )?(?:GLOBAL )?([\w.]+\.\w+)", str(error)):
        return f"a pickled program ({names[0]}), whose code would run; torch.save its state_dict() where you trust it"
    return f"not a whole file of weights, as torch.save or safetensors write them ({one_line(error)})"


def save(path: Path, tensors: Tensors, about: dict[str, str]) -> None:
    """As safetensors with ``about``, which is text."""
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write(safetensors.torch.save(held, about))
