"""A mean teacher that chooses images of small loss: a stand-in for the progressive teacher (PT), which has no program.

The teacher's weights are the moving average of the student's, which looks back less far in the first steps (Tarvainen &
Valpola, 2017: a decay of min(1 - 1 / (t + 1), decay) in step t), or a short run would be over before the teacher has
forgotten its random weights. The student learns from the images whose loss is small to the teacher, and to predict of
an image what the teacher predicts of its twin. The teacher classifies.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import option
from . import Method, MethodOptions, Task, soft
from .tables import TableHead


@dataclass(frozen=True)
class Options(MethodOptions):
    """a mean teacher with small-loss selection, in place of PT"""

    decay: float = option(0.999, "of the teacher's moving average", low=0, high=1 - 1e-9)
    left_out: float = option(
        0.2, "share of a batch that is not learned from, at the end of the warm-up", low=0, high=0.9
    )
    warmup: int = option(10, "epochs over which that share and the consistency grow", low=1)
    consistency_weight: float = option(1.0, "of the squared difference of the predictions", low=0)

    def build(self, backbone, task) -> MeanTeacher:
        return MeanTeacher(backbone, task, self)


class MeanTeacher(Method):
    capturable = False
    steps: Tensor

    def __init__(self, backbone, task: Task, options: Options) -> None:
        n = len(task.counts)
        head = TableHead(backbone.channels, torch.eye(n), torch.ones(n), torch.zeros(n), task.backend)
        super().__init__(backbone, head)
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(head)})
        self.teacher.requires_grad_(False).eval()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.options = options

    def train(self, mode: bool = True) -> MeanTeacher:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher["head"](self.teacher["backbone"](images))

    def maps(self, images: Tensor) -> Tensor:
        return self.teacher["head"].maps(self.teacher["backbone"](images))  # type: ignore[operator]

    def losses(self, batch) -> dict[str, Tensor]:
        options, (image, twin) = self.options, batch.pair().chunk(2)
        z = self.head(self.backbone(image))
        with torch.no_grad():
            of_teacher = self.forward(twin)
        target, grown = soft(batch.labels, z.shape[1]), min(1.0, batch.epoch / options.warmup)
        kept = max(1, round((1 - grown * options.left_out) * len(z)))
        chosen = (target * of_teacher.log_softmax(1)).sum(1).topk(kept).indices  # the largest log likelihoods
        classification = -(target * z.log_softmax(1)).sum(1)[chosen].mean()
        consistency = (z.softmax(1) - of_teacher.softmax(1)).square().sum(1).mean()
        loss = classification + grown * options.consistency_weight * consistency
        return {"loss": loss, "classification": classification, "consistency": consistency}

    @torch.no_grad()
    def after_step(self, batch) -> None:
        student = {
            **dict(self.backbone.named_parameters(prefix="backbone")),
            **dict(self.head.named_parameters("head")),
        }
        self.steps += 1
        share = (1 / (self.steps + 1)).clamp(min=1 - self.options.decay)
        for name, parameter in self.teacher.named_parameters():
            parameter.lerp_(student[name], share)
        buffers = {**dict(self.backbone.named_buffers(prefix="backbone")), **dict(self.head.named_buffers("head"))}
        for name, buffer in self.teacher.named_buffers():
            buffer.copy_(buffers[name])
