"""docs/benchmark.md and the README's line show the newest results, and are what the command writes."""

import json

import pytest
from support.benchmark import GPU_ROWS, PAPER, rows

from bench import report, results
from bench.__main__ import main

CPU = {
    "kind": "cpu", "device": "AMD EPYC", "capability": "AVX2", "threads": 2, "torch": "2.11.0", "memory": "fresh",
    "date": "2026-01-02T00:00:00", "commit": "0123456789abcdef", "dirty": True, "copy_gb_per_s": 30.0, "quiet": True,
    "bfloat16_over_float32": {}, "rows": rows("N1-float32", ours=2000, identity=1600, plain=4100, released=30000),
}  # fmt: skip
GPU = {
    "kind": "cuda", "device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0",
    "date": "2027-01-02T00:00:00", "commit": "0123456789abcdef", "dirty": None, "copy_gb_per_s": 4300.0,
    "rows": GPU_ROWS, "served_by": {r["case"]: "cuda" for r in GPU_ROWS},
    "left_out": ["N512-C768-channels_last-float32"],
}  # fmt: skip
STEP = {
    "kind": "cuda", "device": "NVIDIA H200", "date": "2027-01-02T00:00:00", "commit": None, "dirty": None,
    "config": {"backbone": {"name": "resnet18"}, "image_size": 224, "batch_size": 32, "compute": {"amp": "bf16"}},
    "rows": [
        {"contender": "ours", "ms": [1, 7.5, 9], "images_per_s": 4266.7},
        {"contender": "as the authors", "ms": [1, 15.0, 16], "images_per_s": 2133.3},
    ],
    "parts_ms": {"views": 1.0, "head": 3.0}, "threads": 16, "torch": "2.11.0",
    "whole_run": {"whole_run_s": 172.6},
}  # fmt: skip


def _save(path, result, **changes):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**result, **changes}))


def test_the_newest_undisturbed_result_of_each_kind_of_memory_is_shown(tmp_path):
    _save(tmp_path / "op-old.json", CPU, date="2020-01-01", device="Old")
    _save(tmp_path / "op-new.json", CPU, date="2021-01-01", device="New")
    _save(tmp_path / "op-disturbed.json", CPU, date="2022-01-01", device="Disturbed", quiet=False)
    _save(tmp_path / "op-reused.json", CPU, date="2020-01-01", device="Other", memory="reused")
    assert [r["device"] for r in results.newest_cpu(tmp_path)] == ["New", "Other"]


def test_a_gpus_newest_results_are_found_in_folders_too(tmp_path):
    assert results.newest_gpu(tmp_path) == []
    _save(tmp_path / "op-old.json", GPU, date="2026-01-01", copy_gb_per_s=1.0)
    _save(tmp_path / "gpu/op-cuda-nvidia-h200.json", GPU)
    _save(tmp_path / "gpu/op-rehearsal-cpu.json", GPU, kind="rehearsal", date="2028-01-01")
    assert results.newest_gpu(tmp_path) == [json.loads(json.dumps(GPU))]
    _save(tmp_path / "step-old.json", STEP, date="2026-01-01", torch="old")
    _save(tmp_path / "gpu/step-resnet18-cuda-nvidia-h200.json", STEP)
    _save(tmp_path / "step-cpu.json", STEP, kind="cpu", device="AMD EPYC")
    _save(tmp_path / "op-cpu.json", CPU)
    assert [(r["kind"], r["torch"]) for r in results.newest_steps(tmp_path)] == [("cpu", "2.11.0"), ("cuda", "2.11.0")]
    assert results.newest_cpu(tmp_path) == [CPU]


def test_the_page_of_a_cpu():
    text = report.page([CPU], [], [])
    assert "AMD EPYC (AVX2), 2 threads, torch 2.11.0, 2026-01-02, commit 012345678 with local changes" in text
    assert "| case | ours | identity |" in text
    assert "| N1-float32 | 2.00 | 1.60 (0.80×) | 4.10 (2.05×) | - | 30.00 (15.00×) |" in text
    assert "| time against the identity op | at most 1.3× | 1.25× | yes |" in text
    assert "| speed-up over plain eager, compiled | at least 2.5× | 2.05× | **no** |" in text
    assert "| speed-up over best eager, compiled | at least 1.2× | not measured | **no** |" in text
    assert "not yet run on a GPU" in text
    assert "No result is committed yet" in report.page([], [], [])


def test_the_page_of_a_gpu():
    text = report.page([], [GPU], [STEP])
    assert "not yet run on a GPU" not in text
    assert "### NVIDIA H200" in text and "commit 012345678, copy bandwidth 4300 GB/s" in text
    assert f"| {PAPER} | 10.00 (cuda) | 12.00 (1.20×) | 40.00 (4.00×) | 29.00 (2.90×) | 260.00 (26.00×) |" in text
    assert f"| {PAPER} | 70.0 | 50.0 | 2 | 3.5 | 4000 | 30% |" in text
    assert "| the paper's batch in a CUDA graph | at most 12 µs | 10.00 µs | yes |" in text
    assert "| share of the copy bandwidth, large and wide | at least 0.9 | 0.91 | yes |" in text
    assert "| ours | 7.50 (1.00×) | 4266.7 |" in text and "| as the authors | 15.00 (2.00×) | 2133.3 |" in text
    assert "taken apart: views 25.0%, head 75.0%." in text
    assert "extrapolated from the steady state | at most 180 s | 172.60 s | yes |" in text
    assert "Left out for want of time: N512-C768-channels_last-float32." in text
    assert "taken apart" not in report.page([], [GPU], [])
    on_triton = {**GPU, "rows": [*GPU_ROWS, *rows(PAPER, triton=11.0)]}
    assert f"| {PAPER} | 10.00 (cuda) | 11.00 (1.10×) | 12.00" in report.page([], [on_triton], [])


def test_the_speed_line_gives_ranges_by_device_and_memory():
    slower = rows("N2-float32", ours=1000, plain=9960, best=3000, released=7600)
    both = [
        {**CPU, "rows": [*CPU["rows"], *slower, *rows("N2-bfloat16", ours=1, plain=99)]},
        {**CPU, "memory": "reused"},
    ]
    line = report.speed_line(both, [])
    assert "2.0–10×, 3.0× and 7.6–15× as fast with fresh memory" in line
    assert "2.0×, (not measured) and 15× as fast with reused memory (float32, AMD EPYC, AVX2, 2 threads)" in line
    on_gpu = report.speed_line(both, [GPU])
    assert "2.9–4.0×, 0.1–2.9× and 20–36× as fast (bfloat16, NVIDIA H200); " in on_gpu
    assert report.speed_line([], []) == "[Every case, and the goals that are not met](docs/benchmark.md)."


def test_the_line_stands_between_the_markers():
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter"
    once = report.insert(readme, "new")
    assert once == report.insert(once, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter"
    with pytest.raises(ValueError, match="markers"):
        report.insert("no markers", "new")


def test_readme_and_page_are_generated():
    assert main(["report", "--check"]) == 0, "run: python -m bench report"


def test_report_check_fails_where_one_is_stale_or_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "PAGE", tmp_path / "benchmark.md")
    report.README.write_text(f"{report.BEGIN} stale {report.END}")
    assert main(["report", "--check"]) == 1
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["README.md", "benchmark.md"]
    assert not report.PAGE.exists()
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0
