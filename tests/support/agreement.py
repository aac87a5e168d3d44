"""One call of the head on a backend; all outputs and gradients against the float64 truth."""

import torch

import rebalfer_kernels as rk

from . import oracle
from .cases import case
from .tolerances import ROUNDING, TOLERANCE


def check(backend, data, *, mean, seed=1, slack=1, **options):
    """All outputs and gradients with signed random upstreams on each output at once."""
    features, weight, bias, targets, table, v = data
    n, classes = len(features) // 2, len(weight)
    f, w, b = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (features, weight, bias))
    out = rk.rebalanced_head_loss(
        f, w, b, targets, target_table=table, map_weights=v, reduction="mean" if mean else "none",
        return_maps=True, backend=backend.name, **options,
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    ups = [torch.randn(() if mean else (n,), generator=g).to(out.loss.dtype) for _ in range(3)]
    ups.append(torch.randn(2 * n, classes, generator=g).to(out.loss.dtype))
    grads = torch.autograd.grad(out[:4], (f, w, b), [up.to(backend.device) for up in ups])
    translate = {"consistency_weight": "lam", "detach_cam_weight": "detach"}
    truth = oracle.head(
        *(x.cpu() for x in data), mean=mean, g_loss=ups[0], g_cls=ups[1], g_cons=ups[2],
        g_logits=ups[3], **{translate.get(k, k): x for k, x in options.items()},
    )  # fmt: skip
    for name in ("loss", "classification", "consistency", "logits", "maps"):
        oracle.assert_close(getattr(out, name).cpu(), truth[name], slack * TOLERANCE[features.dtype], name)
        assert not out.maps.requires_grad
    for name, got in zip(("d_features", "d_weight", "d_bias"), grads, strict=True):
        oracle.assert_close(got.cpu(), truth[name], slack * ROUNDING[got.dtype], name)
    if backend.name != "reference" and rk.explain(features, weight).copies == ():
        assert grads[0].stride() == features.stride()


def run(backend: str, data, upstreams=None, **options):
    """Outputs and gradients by name, of the loss or, given four upstreams, of all four outputs."""
    features, weight, bias, targets, table, v = data
    f, w, b = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (features, weight, bias))
    out = rk.rebalanced_head_loss(
        f, w, b, targets, target_table=table, map_weights=v, return_maps=True, backend=backend, **options
    )
    if upstreams is None:
        grads = torch.autograd.grad(out.loss.sum(), (f, w, b))
    else:
        grads = torch.autograd.grad(out[:4], (f, w, b), upstreams)
    named = dict(zip(("loss", "classification", "consistency", "logits", "maps"), out, strict=True))
    return named | dict(zip(("d_features", "d_weight", "d_bias"), grads, strict=True))


def check_labels_out_of_range(backend, device):
    """That sample's classification and gradients are NaN; its consistency and all other samples are as ever."""
    data = case(5, 24, 7, 7, 7, torch.float32, device=device)
    for label in (7, -1, 2**40):
        targets = data[3].clone()
        targets[2] = label
        got = run(backend.name, (*data[:3], targets, *data[4:]), reduction="none")
        expected = run(backend.name, data, reduction="none")
        others = [0, 1, 3, 4]
        assert got["classification"][2].isnan() and got["loss"][2].isnan()
        assert torch.equal(got["consistency"], expected["consistency"])
        assert torch.equal(got["loss"][others], expected["loss"][others])
        assert torch.equal(got["logits"], expected["logits"])
        assert got["d_features"][[2, 7]].isnan().all()
        kept = others + [5 + i for i in others]
        assert torch.equal(got["d_features"][kept], expected["d_features"][kept])
        assert got["d_weight"].isnan().all() and got["d_bias"].isnan().all()
        assert run(backend.name, (*data[:3], targets, *data[4:]))["loss"].isnan()
