"""The relative L2 errors that results may have, by the dtype of the features."""

import torch

#: Of losses, logits and maps, which are computed in float32 at least.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
#: Of gradients, which are rounded once to their dtype.
ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
