"""A training step as the programs published with the papers take it, beside which the trainer's is timed.

Each image is decoded from JPEG and transformed on the CPU whenever it is used; the backbone is called once for each
view; the maps are the whole product of features and weight. Written from the description of those programs.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

QUALITY = 90  #: of the JPEG files


class Files:
    """Images as JPEG files in memory, and the transforms of the programs."""

    def __init__(self, images: Tensor, size: int) -> None:
        self.contents = [_jpeg(image) for image in images]
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
                transforms.RandomErasing(p=0.5, scale=(0.02, 0.25)),
            ]
        )

    def batch(self, rows: Tensor, workers: ThreadPoolExecutor) -> Tensor:
        """(N, 3, H, W) float32, a worker an image; Pillow and PyTorch let workers run at the same time."""
        return torch.stack(list(workers.map(self._one, rows.tolist())))

    def _one(self, row: int) -> Tensor:
        with Image.open(io.BytesIO(self.contents[row])) as image:
            return self.transform(image.convert("RGB"))


def _jpeg(image: Tensor) -> bytes:
    """Of (h, w, 1 or 3) uint8."""
    content = io.BytesIO()
    Image.fromarray(image.expand(-1, -1, 3).cpu().numpy()).save(content, "jpeg", quality=QUALITY)
    return content.getvalue()
