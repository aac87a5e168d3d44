"""The plan for several GPUs: its model against numbers worked out by hand, its page against the command."""

import pytest

from bench import scale
from bench.__main__ import main


def test_the_exchange_of_a_ring_by_hand():
    link = scale.Link("", bytes_per_s=10e9, latency_s=1e-6)
    # 100 MB on 4 GPUs: each sends 2 * 3/4 * 100 MB over 8 GB/s, in 6 messages.
    assert scale.exchange_s(100e6, 4, link) == pytest.approx(150e6 / 8e9 + 6e-6)
    assert scale.exchange_s(100e6, 1, link) == 0
    assert scale.exchange_s(100e6, 64, link) > scale.exchange_s(100e6, 8, link)


def test_parameters_are_the_published_ones():
    assert scale.parameters("resnet18") == 11_180_103  # 11,689,512 with 1000 classes: 513,000 less, 3,591 more
    assert 11_689_512 - 512 * 1000 - 1000 + 512 * 7 + 7 == 11_180_103


def test_the_page_is_generated():
    assert main(["scale", "--check"]) == 0, "run: python -m bench scale"


def test_a_measured_step_says_what_is_hidden(monkeypatch):
    step = {"kind": "cuda", "device": "H200", "config": {"backbone": {"name": "resnet18"}}}
    step["parts_ms"] = {"backbone backward": 1.0}
    monkeypatch.setattr(scale.results, "newest_by_backbone", lambda program: [step])
    text = scale._measured()
    assert "resnet18 on H200: backward of the backbone 1.00 ms" in text
    # 44.7 MB: 0.26 ms over NVLink, 2.8 ms over InfiniBand
    assert "hidden (0.26 ms), visible (2.8" in text
