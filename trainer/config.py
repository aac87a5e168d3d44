"""Everything a run depends on; saved in each checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

METHODS = ("rebalanced", "baseline")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the paper's recipe; each field is a flag of ``python -m trainer train``."""

    name: str = _option("run", "results go to runs/NAME")
    data: str = _option("synthetic", "synthetic, or imagefolder:PATH with PATH/train/CLASS and PATH/val/CLASS")
    backbone: str = _option("resnet18", "a timm model with an exact linear CAM; the paper's is resnet18")
    backbone_options: dict = field(
        default_factory=dict, metadata={"help": """JSON for timm.create_model, such as '{"img_size": 112}'"""}
    )
    method: str = _option("rebalanced", "rebalanced (the paper), or baseline: plain cross-entropy on one view")
    seed: int = _option(0, "of the weights, the order, the augmentation and the synthetic faces")
    epochs: int = _option(60, "the paper: 60")
    batch_size: int = _option(32, "images a step, each with its mirrored twin; the released recipes: 32")
    learning_rate: float = _option(1e-4, "Adam's; the paper: 1e-4")
    weight_decay: float = _option(1e-4, "Adam's; the paper: 1e-4")
    decay: float = _option(0.9, "ExponentialLR factor per epoch; the paper: 0.9")
    alpha: float = _option(0.1, "share of the label given to classes by their weight, Eq. 8; the paper: 0.1")
    consistency_weight: float = _option(2.0, "lambda of Eq. 6; the paper: 2")
    beta: float = _option(0.9999, "of the class weights, Eq. 4; the paper: 0.9999")
    image_size: int = _option(224, "side in pixels; the paper: 224")
    train_size: int = _option(12271, "synthetic training images; RAF-DB has 12271")
    test_size: int = _option(3068, "synthetic test images; RAF-DB has 3068")
    device: str = _option("auto", "auto, cpu or cuda")
    amp: str = _option("off", "off, or bf16: the backbone in bfloat16 autocast")
    channels_last: bool = _option(False, "keep images and weights in NHWC order; often faster")
    backend: str | None = _option(None, "of the head, such as reference or cpu; chosen by itself if left out")
    tensorboard: bool = _option(False, "also write TensorBoard events into runs/NAME")

    def __post_init__(self) -> None:
        for option, allowed in (
            ("method", METHODS),
            ("device", ("auto", "cpu", "cuda")),
            ("amp", ("off", "bf16")),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(f"{option}: got {getattr(self, option)!r}, expected one of {', '.join(allowed)}")
        for option in ("epochs", "batch_size", "image_size", "train_size", "test_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}: got {getattr(self, option)}, expected a whole number >= 1")
        for option in ("learning_rate", "decay"):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option}: got {getattr(self, option)}, expected a number > 0")
        if self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"name: got {self.name!r}, expected the name of one folder under runs/")

    def differences(self, other: dict) -> dict:
        """Fields whose value differs from the saved ``other``: name -> (saved, now)."""
        now = dataclasses.asdict(self)
        return {k: (other.get(k), v) for k, v in now.items() if other.get(k) != v}


#: Both methods within minutes on two CPU cores: a thin ResNet-10 from scratch, with an 8 x 8 map of a 64-pixel face.
DEMO = Config(
    name="demo",
    backbone="resnet10t",
    backbone_options={"channels": [16, 32, 64, 128], "stem_width": 8, "output_stride": 8},
    epochs=16,
    learning_rate=2e-3,
    decay=0.85,
    alpha=0.3,  # the share that the released program gives away
    consistency_weight=0.5,  # from scratch, the paper's 2 holds so short a run back
    batch_size=64,
    image_size=64,
    train_size=3000,
    channels_last=True,
)
