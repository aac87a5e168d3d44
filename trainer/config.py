"""Everything a run depends on; saved with each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Config:
    name: str = "run"  #: results go to runs/NAME
    data: str = "synthetic"
    backbone: str = "resnet18"
    backbone_options: dict = field(default_factory=dict)  #: handed to timm.create_model
    method: str = "rebalanced"  #: or "baseline": plain cross-entropy on one view
    seed: int = 0
    epochs: int = 60  #: the paper's, as the five below
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    decay: float = 0.9  #: ExponentialLR, per epoch
    alpha: float = 0.1
    consistency_weight: float = 2.0
    beta: float = 0.9999
    batch_size: int = 32
    image_size: int = 224
    train_size: int = 12271  #: of the synthetic data
    channels_last: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.method not in ("rebalanced", "baseline"):
            raise ValueError(f"method: got {self.method!r}, expected 'rebalanced' or 'baseline'")
        for option in ("epochs", "batch_size", "image_size", "train_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}: got {getattr(self, option)}, expected a whole number >= 1")


#: Small enough for two CPU cores in a few minutes: a thin ResNet-10 with an 8 x 8 map.
DEMO = Config(
    name="demo",
    backbone="resnet10t",
    backbone_options={"channels": (16, 32, 64, 128), "output_stride": 8},
    epochs=8,
    learning_rate=2e-3,
    decay=0.75,
    batch_size=64,
    image_size=64,
    train_size=4000,
)
