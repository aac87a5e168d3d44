"""Random inputs of the head, the same numbers on every device."""

import torch

import rebalfer_kernels as rk


def case(n, c, h, w, classes, dtype, layout="nchw", seed=0, soft=False, device="cpu", weight_dtype=None):
    """features, weight, bias, targets, target_table, map_weights; the same numbers on every device."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2 * n, c, h, w, generator=g, dtype=torch.float64).to(device, dtype)
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "slice":
        features = torch.cat([features, features], 1)[:, :c]
    weight = (torch.randn(classes, c, generator=g, dtype=torch.float64) / c**0.5).to(device, weight_dtype or dtype)
    bias = torch.randn(classes, generator=g, dtype=torch.float64).to(device, weight_dtype or dtype)
    targets = torch.randint(0, classes, (n + 1,), generator=g).to(device)[1:]  # not aligned to 16 bytes
    if soft:
        targets = torch.rand(n, classes, generator=g, dtype=torch.float64).to(device)
    weights = rk.effective_number_weights([10 * 3**i + 1 for i in range(min(classes, 12))] + [7] * (classes - 12))
    return features, weight, bias, targets, (rk.target_table(weights) * 1.25).to(device), weights.sqrt().to(device)
