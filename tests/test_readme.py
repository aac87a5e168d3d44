"""The README's example runs as it stands, and trains."""

import re
from pathlib import Path

import torch


def test_readme_example_runs():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == (4, 7)
    assert torch.isfinite(scope["out"].loss)
    assert scope["backbone"].weight.grad.abs().sum() > 0
