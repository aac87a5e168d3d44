"""What every run has, as frozen dataclasses, and how a method's or data set's own options join them.

A file ``methods/NAME.py`` or ``data/NAME.py`` that defines a frozen dataclass ``Options`` is a method or a data set
called NAME: its fields become the flags ``--method.FIELD`` or ``--data.FIELD``. Nothing lists the names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import math
import pkgutil
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

logger = logging.getLogger(__package__)  #: of all that a run says while it works


class UserError(Exception):
    """What the user can mend: one line, no traceback. Everything else is an error of the program and keeps its own."""

    status = 2  #: of the process that ends with it


#: What a field that changed between a run and its resumption means for it.
RESULTS, ROUNDING, NOTHING = "results", "rounding", "nothing"


def option(default: Any, text: str = "", *, changes: str = RESULTS, **metadata: Any) -> Any:
    """A field with its help and what it changes: the results, only their rounding, or nothing of them.

    ``low``, ``high`` and ``above`` are the limits of its number, see :func:`expect_number`, beside which ``off`` is
    allowed; ``choices`` all its values, which are its help if it has no other. A ``positional`` one has no name on the
    command line.
    """
    metadata |= {"help": text or f"one of {', '.join(metadata['choices'])}", "changes": changes}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


#: Types of options whose values must be of them; a number may be whole, and what may be missing is anything.
KINDS = {bool: "true or false", int: "a whole number", str: "text", dict: "values by name, such as '{a: 1}'"}


class Checked:
    """Base of options: a value of another type, beyond the limits of its field or not among its choices is refused."""

    group = ""  #: in which a config holds them

    def __init_subclass__(cls, group: str = "") -> None:
        cls.group = group or cls.group

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, name = getattr(self, f.name), f"{self.group}.{f.name}".lstrip(".")
            if "low" in f.metadata and value not in (None, f.metadata.get("off")):
                expect_number(name, value, **{k: v for k, v in f.metadata.items() if k in ("low", "high", "above")})
            if choices := f.metadata.get("choices"):
                expect(value in choices, name, value, " or ".join(choices))
            kind = dict if f.type == "dict" else type(f.default)
            expect(kind not in KINDS or type(value) is kind, name, value, KINDS.get(kind, ""))


class Named(Checked):
    """Options that a file of a package defines under the name ``Options``."""

    @property
    def name(self) -> str:
        """The name of that file, which is their name on the command line."""
        return type(self).__module__.rpartition(".")[2]


@functools.cache
def found(package: str) -> dict[str, type]:
    """Name -> ``Options`` of each file in trainer/``package`` that defines them."""
    folder = importlib.import_module(f"{__package__}.{package}")
    modules = (importlib.import_module(f"{folder.__name__}.{m.name}") for m in pkgutil.iter_modules(folder.__path__))
    return {m.__name__.rpartition(".")[2]: m.Options for m in modules if hasattr(m, "Options")}


#: Fields of :class:`Config` that hold a file's ``Options`` -> the package of those files.
PACKAGES = {"method": "methods", "data": "data"}


def expect(ok: bool, name: str, got: object, expected: str) -> None:
    """Raises :class:`UserError` by the option's name unless ``ok``."""
    if not ok:
        raise UserError(f"{name}: got {got!r}, expected {expected}")


def expect_package(name: str, *packages: str) -> None:
    """Raises :class:`UserError` by the option ``name`` unless the packages that it needs are installed."""
    if missing := [package for package in packages if not importlib.util.find_spec(package)]:
        raise UserError(f"{name}: needs packages that are not installed: pip install {' '.join(missing)}")


def expect_number(name: str, value: float, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """A finite number from ``low``, or above it, to ``high``."""
    ok = isinstance(value, int | float) and math.isfinite(value) and value <= high
    ok = ok and (low < value if above else low <= value)
    end = "" if high == math.inf else f" and <= {high:g}"
    expect(ok, name, value, f"a finite number {'>' if above else '>='} {low:g}{end}")


def title(options: object) -> str:
    """The first line of a docstring, which is what a help shows."""
    return (options.__doc__ or "").splitlines()[0]


def spelt(name: str) -> str:
    """A name of the command line as its file has it.

    >>> spelt("logit-adjust")
    'logit_adjust'
    """
    return name.replace("-", "_")


def printable(name: str) -> str:
    r"""The name of a file with what no terminal shows as escapes: control characters, bytes that are no text.

    >>> printable("a\nb"), printable("été")
    ('a\\nb', 'été')
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def listed(items: Sequence[str], most: int) -> str:
    """The first ``most`` items and how many more.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    rest = len(items) - most
    return ", ".join(map(printable, items[:most])) + (f" and {rest} more" if rest > 0 else "")


def one_line(error: BaseException) -> str:
    """What an exception says, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class Backbone(Checked, group="backbone"):
    """backbone: a timm model whose class activation maps are exact"""

    name: str = option("resnet18", "a timm model; the paper's is resnet18")
    options: dict = option({}, "for timm.create_model, such as '{img_size: 112}'")
    weights: str = option("", "file or name of weights to start from (docs/weights.md)", changes=NOTHING)
    train_from: str = option("", "first part that trains, such as layer4; what comes before it stays as it is")
    frozen_batchnorm: bool = option(False, "BatchNorm keeps the statistics it starts with")
    separate_views: bool = option(False, "BatchNorm statistics of each view for itself, as with two forward passes")


@dataclass(frozen=True)
class SplitOptions(Checked, group="split"):
    """which images train and which choose the best epoch"""

    choose_on: str = option("held-out", "held-out: val, or else part of train; or test", choices=("held-out", "test"))
    hold_out: float = option(0.1, "part of train held out where the data has no val", low=0, high=0.9, above=True)
    imbalance: float = option(0.0, "largest over smallest class, made by leaving images out; 0: as it is", low=1, off=0)
    folds: int = option(0, "all images in parts, one of which is the test; 0: as they are on disk", low=2, off=0)
    fold: int = option(0, "which of these parts is the test, from 0")
    groups: str = option("", "CSV of file and group, such as a person: none is in two parts", changes=NOTHING)

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_number("split.fold", self.fold, 0, max(0, self.folds - 1))
        expect(not self.groups or self.folds > 0, "split.groups", self.groups, "split.folds too")


@dataclass(frozen=True)
class Augment(Checked, group="augment"):
    """what is done to a training image before its views are made"""

    flip: float = option(0.5, "probability of a mirrored image", low=0, high=1)
    shift: float = option(1 / 16, "largest shift, as a part of the side; the border is repeated", low=0, high=0.5)
    crop: float = option(0.0, "smallest area of a random crop, in place of the shift; 0: none", low=0, high=1)
    brightness: float = option(0.0, "largest change of a random factor, such as 0.2", low=0, high=1)
    contrast: float = option(0.0, "largest change of a random factor, such as 0.2", low=0, high=1)
    noise: float = option(0.0, "standard deviation of Gaussian noise, of 255 grey levels", low=0, high=255)
    noise_probability: float = option(0.5, "of an image with noise", low=0, high=1)
    erase: float = option(0.0, "probability of a rectangle that is erased in both views", low=0, high=1)
    erase_largest: float = option(0.25, "largest area of that rectangle; the smallest is 0.02", low=0.02, high=1)
    versions: int = option(0, "of an image, whose activations before train_from are kept on disk; 0: any number", low=0)


@dataclass(frozen=True)
class Optim(Checked, group="optim"):
    """optimiser and its schedule"""

    optimizer: str = option("adam", "adam, adamw, sgd (Nesterov, 0.9) or another of timm's")
    options: dict = option({}, "for the optimiser, such as '{betas: [0.9, 0.95]}'")
    weight_decay: float = option(1e-4, "the paper: 1e-4", low=0)
    decay_all: bool = option(True, "weight decay of biases and normalisation layers too, as PyTorch does")
    schedule: str = option("exponential", choices=("exponential", "cosine", "constant"))
    schedule_by: str = option("epoch", "epoch, or step: how often the schedule changes", choices=("epoch", "step"))
    decay: float = option(0.9, "factor per epoch of schedule exponential; paper: 0.9", low=0, high=1, above=True)
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    clip: float = option(0.0, "largest norm of the gradient; 0: not clipped", low=0)
    accumulate: int = option(1, "parts in which a batch is computed, one after the other, to save memory", low=1)
    average: float = option(0.0, "decay of the weights' moving average, as 0.9998; 0: none", low=0, high=1 - 1e-9)


@dataclass(frozen=True)
class Compute(Checked, group="compute"):
    """device and precision"""

    device: str = option("auto", changes=ROUNDING, choices=("auto", "cpu", "cuda"))
    amp: str = option("off", "bf16 or fp16: autocast of the backbone", choices=("off", "bf16", "fp16"))
    channels_last: bool = option(False, "images and weights in NHWC order; often faster", changes=ROUNDING)
    backend: str | None = option(None, "of the head, such as cpu or reference; chosen if left out", changes=ROUNDING)
    threads: int = option(0, "of the CPU; 0: as PyTorch chooses", changes=ROUNDING, low=0, high=1024)
    compile: bool = option(False, "the backbone through torch.compile", changes=ROUNDING)
    cuda_graph: bool = option(False, "the whole step as a CUDA graph", changes=ROUNDING)
    sync_batchnorm: bool = option(False, "BatchNorm statistics over the images of all GPUs")


@dataclass(frozen=True)
class Output(Checked, group="output"):
    """what a run writes"""

    root: str = option("runs", "folder of the runs", changes=NOTHING)
    cache: str = option("", "folder of decoded images; off: none; else in the user's cache", changes=NOTHING)
    save_minutes: float = option(10.0, "minutes between checkpoints inside an epoch", changes=NOTHING, low=0)
    tensorboard: bool = option(False, "also TensorBoard events", changes=NOTHING)
    pictures: bool = option(True, "confusion.png and cam.png at the end", changes=NOTHING)


@dataclass(frozen=True)
class Config(Checked):
    """One run. Its presets are functions in presets.py; each field is a flag of ``python -m trainer train``."""

    method: Any = option(dataclasses.MISSING, "a file of trainer/methods")
    data: Any = option(dataclasses.MISSING, "a file of trainer/data")
    name: str = option("run", "results go to ROOT/NAME", changes=NOTHING)
    epochs: int = option(60, "the paper: 60", changes=NOTHING, low=1)
    batch_size: int = option(32, "images a step; the released recipes: 32", low=1)
    learning_rate: float = option(1e-4, "the paper: 1e-4", low=0, above=True)
    image_size: int = option(224, "side in pixels; the paper: 224", low=1)
    seed: int = option(0, "of weights, order, augmentation and synthetic faces", low=0, high=2**63 - 1)
    backbone: Backbone = field(default_factory=Backbone)
    augment: Augment = field(default_factory=Augment)
    split: SplitOptions = field(default_factory=SplitOptions)
    optim: Optim = field(default_factory=Optim)
    compute: Compute = field(default_factory=Compute)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        super().__post_init__()
        bad = self.name in ("", ".", "..") or set(self.name) & set('/\\:*?"<>|\0\n') or len(self.name.encode()) > 200
        expect(not bad, "name", self.name, "the name of one folder")


def without_effect(config: Config) -> list[str]:
    """A line for each option that was changed from its default and does nothing in this run."""
    optim, augment, split, backbone = config.optim, config.augment, config.split, config.backbone
    rules: list[tuple[Any, str, bool, str]] = [
        (optim, "decay", optim.schedule != "exponential", f"with optim.schedule {optim.schedule}"),
        (optim, "schedule_by", optim.schedule == "constant", "with optim.schedule constant"),
        (augment, "shift", augment.crop > 0, "with augment.crop"),
        (augment, "noise_probability", not augment.noise, "without augment.noise"),
        (augment, "erase_largest", not augment.erase, "without augment.erase"),
        (split, "fold", not split.folds, "without split.folds"),
        (split, "hold_out", split.choose_on == "test", "with split.choose_on test"),
        (backbone, "separate_views", backbone.frozen_batchnorm, "with backbone.frozen_batchnorm"),
        *(
            (augment, name, augment.versions == 1, "with augment.versions 1")
            for name in vars(augment)
            if name != "versions"
        ),
    ]
    return [
        f"{options.group}.{name} {getattr(options, name)} has no effect {reason}"
        for options, name, idle, reason in rules
        if idle and getattr(options, name) != getattr(type(options)(), name)
    ]


def as_dict(options: Any) -> dict:
    """Nested plain values; a method's and data set's options carry their ``name``."""
    named = {"name": options.name} if isinstance(options, Named) else {}
    return named | {k: as_dict(v) if dataclasses.is_dataclass(v) else v for k, v in vars(options).items()}


def from_dict(saved: Mapping, default: Any) -> Any:
    """``default`` with what ``saved`` says; a field that it lacks, perhaps newer than the file, keeps its default.

    Raises:
        UserError: an unknown field, method or data set, or a value that the options refuse.
    """
    values = dict(saved)
    if isinstance(default, Named):
        values.pop("name", None)
    known = {f.name for f in dataclasses.fields(default)}
    if unknown := sorted(set(values) - known):
        key = f"{getattr(default, 'group', '')}.{unknown[0]}".lstrip(".")
        raise UserError(f"{key}: got an unknown option, expected one of {', '.join(sorted(known))}")
    for name, value in values.items():
        current = getattr(default, name)
        if dataclasses.is_dataclass(current):
            expect(isinstance(value, Mapping), name, value, "options by name")
            if isinstance(current, Named) and spelt(chosen := value.get("name", current.name)) != current.name:
                current = select(name, chosen)()
            values[name] = from_dict(value, current)
    return dataclasses.replace(default, **values)


def restored(saved: Mapping) -> Config:
    """The config that :func:`as_dict` made ``saved`` of, perhaps before some of today's fields existed."""
    return from_dict(saved, Config(**{kind: select(kind, saved[kind]["name"])() for kind in PACKAGES}))


def select(kind: str, name: str) -> type:
    """The ``Options`` of the method or data set called ``name``."""
    options = found(PACKAGES[kind])
    expect(spelt(name) in options, kind, name, f"one of {', '.join(sorted(options))}")
    return options[spelt(name)]


class Flag(NamedTuple):
    """A field of nested options, as the command line calls it."""

    key: str  #: "optim.decay"
    kind: Any
    value: Any
    metadata: Any


def flags(options: Any, group: str = "") -> Iterator[Flag]:
    """Every field of nested options, the groups in the order of the fields; those of ``config`` are the command's."""
    kinds = typing.get_type_hints(type(options))
    if isinstance(options, Named):
        names = option(options.name, f"one of {', '.join(found(PACKAGES[group]))}").metadata
        yield Flag(f"{group}.name", str, options.name, names)
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if dataclasses.is_dataclass(value):
            yield from flags(value, f.name if f.name != "config" else "")
        else:
            yield Flag(f"{group}.{f.name}".lstrip("."), kinds[f.name], value, f.metadata)


def differences(saved: Config, now: Config) -> dict[str, list[str]]:
    """What changed between two configs: RESULTS, ROUNDING or NOTHING -> "option was -> is"."""
    before = {flag.key: flag.value for flag in flags(saved)}
    changed: dict[str, list[str]] = {RESULTS: [], ROUNDING: [], NOTHING: []}
    for flag in flags(now):
        if (was := before.get(flag.key, flag.value)) != flag.value:
            changed[flag.metadata["changes"]].append(f"{flag.key} {was!r} -> {flag.value!r}")
    return changed
