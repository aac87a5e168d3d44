"""The README's example runs as it stands and trains; the plain PyTorch that it calls equal is."""

import re

import torch
from support.machine import ROOT


def test_the_example_equals_the_plain_pytorch_below_it():
    example, plain = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    torch.manual_seed(0)
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == (4, 7)
    parameters = [*scope["backbone"].parameters(), *scope["head"].parameters()]
    gradients = [p.grad for p in parameters]
    assert all(g.abs().sum() > 0 for g in gradients)

    scope["features"] = scope["backbone"](torch.cat([scope["images"], scope["images"].flip(-1)]))
    exec(plain, scope)
    torch.testing.assert_close(scope["loss"], scope["out"].loss)
    torch.testing.assert_close(torch.autograd.grad(scope["loss"], parameters), tuple(gradients), rtol=1e-4, atol=1e-6)
