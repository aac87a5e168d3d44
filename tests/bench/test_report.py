"""The report shows the newest results, and its files are what the command writes."""

import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support import browser
from support.benchmark import GPU_ROWS, PAPER, rows

from bench import document, model, page, pictures, report, results
from bench.__main__ import main
from bench.model import Measured
from bench.page import Found

CPU = {
    "kind": "cpu", "device": "AMD EPYC", "capability": "AVX2", "threads": 2, "torch": "2.11.0", "memory": "fresh",
    "date": "2027-01-02T00:00:00", "commit": "0123456789abcdef", "dirty": True, "copy_gb_per_s": 30.0, "quiet": True,
    "bfloat16_over_float32": {},
    "rows": rows("N1-C8-nchw-float32", ours=2000, identity=1600, plain=4100, released=30000),
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
    "parts_ms": {"views": 1.0, "head": 3.0}, "capability": "AVX512", "threads": 16, "torch": "2.11.0",
    "whole_run": {"whole_run_s": 172.6},
    "whole_runs": {
        "eager": {"images_per_s": 3000.4, "whole_run_s": 245.4},
        "CUDA graph": {"images_per_s": 4265.6, "whole_run_s": 172.6},
    },
}  # fmt: skip


COUNTED = {
    "kind": "cpu", "device": "AMD EPYC", "capability": "AVX2", "date": "2027-01-02T00:00:00", "commit": None,
    "dirty": None, "config": {"backbone": {"name": "resnet18"}, "image_size": 224, "batch_size": 32},
    "faults": {"none": 4, "fresh": 2400, "reused": 3}, "seen": "reused",
}  # fmt: skip


def _found(cpus=(), gpus=(), steps=(), regimes=(), studies=None, more=(), modelled=()):
    return Found(list(cpus), list(gpus), list(steps), list(regimes), studies or {}, list(more), list(modelled))


def _text(found):
    return document.markdown(page.blocks(found, page.drawn(found)), "benchmark")


def _save(path, result, **changes):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**result, **changes}))


def test_the_newest_undisturbed_result_of_each_cpu_kind_of_memory_and_instruction_set_is_shown(tmp_path):
    _save(tmp_path / "op-old.json", CPU, date="2020-01-01", device="One", torch="old")
    _save(tmp_path / "op-new.json", CPU, date="2021-01-01", device="One")
    _save(tmp_path / "op-disturbed.json", CPU, date="2022-01-01", device="One", quiet=False)
    _save(tmp_path / "op-reused.json", CPU, date="2020-01-01", device="Other", memory="reused")
    _save(tmp_path / "op-wide.json", CPU, date="2019-01-01", device="Wide", capability="AVX512")
    found = [(r["device"], r["torch"]) for r in results.newest_cpu(tmp_path)]
    assert found == [("One", CPU["torch"]), ("Other", CPU["torch"]), ("Wide", CPU["torch"])]


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
    steps = results.newest_by_backbone("step", tmp_path)
    assert [(r["kind"], r["torch"]) for r in steps] == [("cpu", "2.11.0"), ("cuda", "2.11.0")]
    assert results.newest_cpu(tmp_path) == [CPU]


def test_the_page_of_a_cpu():
    text = _text(_found([CPU]))
    assert "AMD EPYC (AVX2), 2 threads, torch 2.11.0, 2027-01-02, commit 012345678 with local changes" in text
    assert "an earlier version of the CPU kernels" not in text
    earlier = _text(_found([{**CPU, "date": "2026-11-26T00:00:00"}]))
    assert "as fast as plain PyTorch" in earlier and "fresh memory, an earlier version of the CPU kernels" in earlier
    assert "| case | ours | identity |" in text
    assert "| N1-C8-nchw-float32 | 2.00 | 1.60 (0.80×) | 4.10 (2.05×) | - | 30.00 (15.00×) |" in text
    assert "not yet run on a GPU" in text
    assert "No result is committed yet" in _text(_found())


def test_every_goal_has_a_verdict():
    text = _text(_found([CPU], [GPU]))
    assert "| time against the identity op | met | 1.25× | at most 1.3× | AMD EPYC (AVX2), fresh memory |" in text
    plain = (
        "| speed-up over plain eager, compiled | **not met** | 2.05× | at least 2.5× | AMD EPYC (AVX2), fresh memory |"
    )
    assert plain in text
    assert "| speed-up over best eager, compiled | open | - | at least 1.2× | AMD EPYC (AVX2), fresh memory |" in text
    assert "| time against the identity op | open | - | at most 1.5× | a CPU, reused memory |" in text
    assert "extrapolated from the steady state | open | - | at most 180 s | a GPU |" in text
    assert "| the paper's batch in a CUDA graph | met | 10.00 µs | at most 12 µs | NVIDIA H200 |" in text
    assert "| share of the copy bandwidth, large and wide | met | 0.91 | at least 0.9 | NVIDIA H200 |" in text
    assert text.count("| counted without a GPU |") == 2


def test_a_goal_that_some_cases_meet_is_open_and_one_that_a_case_misses_is_not_met():
    def verdict(**figures):
        cases = {"met": False, "goal": "g", "sense": "at least", "bound": 2.0, "unit": "×", "cases": figures}
        return page._verdict(cases)

    assert verdict(a=2.5, b=None) == ("open", "2.50× (1 of 2 cases)", "at least 2×")
    assert verdict(a=1.5, b=None) == ("**not met**", "1.50× (1 of 2 cases)", "at least 2×")
    assert verdict(a=None) == ("open", "-", "at least 2×")


def test_the_page_of_a_gpu():
    text = _text(_found(gpus=[GPU], steps=[STEP]))
    assert "not yet run on a GPU" not in text
    assert "### NVIDIA H200" in text and "commit 012345678, copy bandwidth 4300 GB/s" in text
    assert f"| {PAPER} | 10.00 (cuda) | 12.00 (1.20×) | 40.00 (4.00×) | 29.00 (2.90×) | 260.00 (26.00×) |" in text
    assert f"| {PAPER} | 70.0 | 50.0 | 2 | 3.5 | 4000 | 30% |" in text
    assert "| resnet18, ours | 7.50 (1.00×) | 4266.7 |" in text
    assert "| resnet18, as the authors | 15.00 (2.00×) | 2133.3 |" in text
    assert "taken apart: views 25.0%, head 75.0%." in text
    assert "extrapolated from the steady state | met | 172.60 s | at most 180 s | resnet18, NVIDIA H200 |" in text
    assert "| resnet18 on NVIDIA H200, CUDA graph | 4,266 | 173 s |" in text
    assert "Left out for want of time: 1 of 5 cases" in text and "| N512-C768-channels_last-float32 |" in text
    assert "taken apart" not in _text(_found(gpus=[GPU]))
    on_triton = {**GPU, "rows": [*GPU_ROWS, *rows(PAPER, triton=11.0)]}
    assert f"| {PAPER} | 10.00 (cuda) | 11.00 (1.10×) | 12.00" in _text(_found(gpus=[on_triton]))


@pytest.mark.parametrize(
    "changed, rewritten",
    [(["forward"], "forward kernel was"), (["forward", "backward"], "forward and backward kernels were")],
)
def test_a_gpus_page_says_which_kernels_were_rewritten_since(monkeypatch, changed, rewritten):
    monkeypatch.setattr(model, "changed_since", {GPU["commit"]: changed}.get)
    monkeypatch.setattr(model, "triton_changed_since", {GPU["commit"]: ["head_forward"]}.get)
    monkeypatch.setattr(pictures, "changed_since", {GPU["commit"]: changed}.get)
    found = _found(gpus=[GPU])
    text = _text(found)
    place = "NVIDIA H200, an earlier version of the CUDA kernels"
    assert f"released with the papers ({place}, bfloat16, in CUDA graphs, 3 of 3 cases)" in text
    assert f"| at most 12 µs | {place} |" in text
    assert text.count(f"CUDA's {rewritten} rewritten after the NVIDIA H200 had run") == 2
    assert text.count("Triton's head_forward kernel was rewritten after the NVIDIA H200 had run") == 2
    assert f"as fast (bfloat16, {place})" in report.speed_line(found)
    assert [axes.get_title("left") for axes in page.drawn(found)["roofline.png"].axes] == [place.replace(", ", "\n", 1)]


def test_every_figure_of_a_row_is_shown():
    row = {
        "case": "N1-C8-nchw-float32", "contender": "ours", "forward": [1, 1.25, 2], "backward": [1, 1.5, 2],
        "both": [2, 2.75, 3], "ratio_to_identity": 1.1, "gb_per_s": 12.3, "share_of_copy": 0.41, "host_ms": 0.033,
        "far_caches": 0.254, "bytes_over_floor": 1.03, "peak_extra_bytes": 5_500_000, "error": 2.9e-7,
    }  # fmt: skip
    eager = {**row, "contender": "plain eager", "error": 3.1e-7}
    text = _text(_found([{**CPU, "rows": [row, eager]}]))
    figures = "1.25 | 1.50 | 2.75 | 1.10 | 25% | 12 | 41% | 1.03 | 5.5 | 33.0 | - | 2.9e-07 | 3.1e-07 |"
    assert f"| N1-C8-nchw-float32 | ours | {figures}" in text


def test_what_a_training_loop_sees_is_the_headline():
    fresh, reused = CPU, {**CPU, "memory": "reused", "rows": rows("N1-C8-nchw-float32", ours=1000, plain=2500)}
    unknown = _found([fresh, reused])
    assert "2.0×** as fast as plain PyTorch under `torch.compile` (AMD EPYC (AVX2), fresh memory" in _text(unknown)
    known = _found([fresh, reused], regimes=[COUNTED])
    first, _, rest = _text(known).partition("## Goals")
    assert "2.5×** as fast as plain PyTorch" in first and "fresh memory" not in first
    assert (
        "the head touches 4 pages for the first time; with malloc set to fresh memory 2,400, to reused memory 3" in rest
    )
    assert "this training loop sees **reused memory**." in rest and "### Fresh memory" in rest
    assert "2.5×, (not measured) and (not measured) as fast with a training loop's memory (float32" in (
        report.speed_line(known)
    )
    assert rest.index("### Reused memory") < rest.index("### Fresh memory")
    another = _found([reused, {**reused, "device": "Other", "rows": fresh["rows"]}], regimes=[COUNTED])
    assert [(r["device"], r["rows"]) for r in another.headline] == [
        (CPU["device"], reused["rows"]),
        ("Other", fresh["rows"]),
    ]
    differ = _found([fresh, reused], regimes=[COUNTED, {**COUNTED, "seen": "fresh"}])
    assert differ.headline == unknown.headline


def test_the_speed_line_gives_ranges_by_device_and_memory():
    slower = rows("N2-C8-nchw-float32", ours=1000, plain=9960, best=3000, released=7600)
    both = [
        {**CPU, "rows": [*CPU["rows"], *slower, *rows("N2-C8-nchw-bfloat16", ours=1, plain=99)]},
        {**CPU, "memory": "reused"},
    ]
    line = report.speed_line(_found(both))
    assert "2.0–10×, 3.0× and 7.6–15× as fast with fresh memory" in line
    assert "2.0×, (not measured) and 15× as fast with reused memory (float32, AMD EPYC, AVX2, 2 threads)" in line
    on_gpu = report.speed_line(_found(both, [GPU]))
    assert "2.9–4.0×, 0.1–2.9× and 20–36× as fast (bfloat16, NVIDIA H200); " in on_gpu
    earlier = {**CPU, "date": "2026-11-26T00:00:00"}
    assert "2 threads, an earlier version of the CPU kernels)" in report.speed_line(_found([earlier]))
    assert report.speed_line(_found()) == "[Every case, and the goals that are not met](docs/benchmark.md)."


def test_the_line_stands_between_the_markers():
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter"
    once = report.insert(readme, "new")
    assert once == report.insert(once, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter"
    with pytest.raises(ValueError, match="markers"):
        report.insert("no markers", "new")


def test_a_studys_table_is_the_trainers():
    text = _text(_found(studies=results.studies()))
    assert "### All methods on synthetic faces" in text and "| Baseline |" in text


@pytest.fixture(autouse=True)
def settings():
    with pictures.settings():
        yield


def test_other_sizes_and_operations_have_tables_of_their_own():
    measured = [*rows("N1-C8-nchw-float32-14x14", ours=2000, plain=5000), *rows("N1-C8-nchw-float32-maps", ours=1000)]
    text = _text(_found([CPU], more=[{**CPU, "set": "all", "memory": "reused", "rows": measured}]))
    assert "### AMD EPYC (AVX2), reused memory: all" in text and "<summary>maps: 1 cases</summary>" in text
    assert "| N1-C8-nchw-float32-14x14 | 2.00 | - | 5.00 (2.50×) | - | - |" in text
    assert "Other sizes" not in _text(_found([CPU])) and "max-autotune" not in _text(_found([CPU]))
    tuned = {**CPU["rows"][0], "contender": "best eager, max-autotune"}
    assert "| released | best eager, max-autotune |" in _text(_found([{**CPU, "rows": [*CPU["rows"], tuned]}]))


def test_the_model_stands_beside_what_was_measured():
    took = {"forward": 20.0, "backward": 10.0}
    measured = [Measured(f"{way} N32 C512 nchw", "NVIDIA H200", "6f05614", us) for way, us in took.items()]
    text = _text(_found(modelled=[(measured[0], 18.0), (measured[1], 12.5)]))
    assert "It says 0.90 to 1.25 times what was measured" in text
    assert "| forward N32 C512 nchw | NVIDIA H200 | 6f05614 | 20.0 | 18.0 | 0.90× |" in text
    forward, backward = pictures.model([(row.launch, row.us, 18.0) for row in measured]).axes
    assert (forward.get_title("left"), _bars(forward), _bars(backward)) == ("forward", [20.0, 18.0], [10.0, 18.0])
    assert pictures.model([]) is None


def _bars(axes):
    return [round(bar.get_width(), 6) for bar in axes.patches]


def test_a_training_loops_memory_is_fresh_where_a_gradient_is_large():
    small, large = "N64-C1024-nchw-float32", "N64-C2048-nchw-float32"  # gradients of 24.5 and 49 MiB
    fresh = {**CPU, "rows": [*rows(small, ours=1000, plain=9000), *rows(large, ours=1000, plain=3000)]}
    reused = {
        **CPU,
        "memory": "reused",
        "rows": [*rows(small, ours=1000, plain=2000), *rows(large, ours=1000, plain=7000)],
    }
    known = _found([fresh, reused], regimes=[COUNTED])
    assert "2.0–3.0×** as fast as plain PyTorch under `torch.compile` (AMD EPYC (AVX2), a training loop's" in _text(
        known
    )
    never = _found([fresh, reused], regimes=[{**COUNTED, "seen": "fresh"}])
    assert "3.0–9.0×** as fast as plain PyTorch" in _text(never)


def test_a_goal_is_judged_with_the_cases_that_have_no_figure():
    large, missing, failed = (f"N512-C{c}-nchw-bfloat16" for c in (2048, 4096, 8192))
    result = {**GPU, "rows": rows(large, "large and wide", ours=100.0, identity=99.0), "left_out": [missing],
              "errors": [{"case": failed, "error": "no memory"}, {"case": "copy", "error": "none"}]}  # fmt: skip
    assert "open | 1.01× (1 of 3 cases) | at most 1.1×" in _text(_found(gpus=[result]))


def test_a_whole_step_and_the_heads_share_of_it_are_among_the_first_figures():
    first, _, _ = _text(_found(steps=[STEP])).partition("## Goals")
    assert (
        "**2.00×** as fast as a whole training step as the authors take it (resnet18, NVIDIA H200)" in first
        and "other heads" not in first
    )
    heads = {**STEP, "rows": [*STEP["rows"], {"contender": "plain eager", "ms": [7, 7.8, 9], "images_per_s": 4102.6}]}
    first, _, _ = _text(_found(steps=[heads])).partition("## Goals")
    within = "within the spread of the samples for resnet18"
    assert f"with other heads (resnet18, NVIDIA H200), {within}; the head is 75.0 % of it" in first
    apart = {**STEP, "rows": [{**STEP["rows"][0], "ms": [7, 7.5, 8]}, {**STEP["rows"][1], "ms": [14, 15.0, 16]}]}
    first, _, _ = _text(_found(steps=[apart])).partition("## Goals")
    assert "as the authors take it (resnet18, NVIDIA H200)\n" in first and within not in first


def test_a_backward_that_was_not_timed_is_the_difference():
    row = {**GPU_ROWS[0], "forward": [6.0, 6.25, 6.5], "both": [9.5, 10.0, 10.5]}
    text = _text(_found(gpus=[{**GPU, "rows": [row]}]))
    assert "| 6250.00 | (3750.00) | 10000.00 |" in text


def test_what_a_study_shows_is_said_in_words():
    text = _text(_found(studies=results.studies()))
    assert "**above Baseline**: Logit adjustment (+15.0 ± 6.0); " in text
    assert "**below Baseline**: " in text and "EAC (-" in text.partition("**below Baseline**")[2]


def test_the_bars_are_times_over_ours():
    figure = pictures.speed_ups([CPU, {**CPU, "rows": []}])
    (axes,) = figure.axes
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([0.8, 2.05, 15.0])  # no best eager
    assert {bar.get_x() for bar in axes.patches} == {1.0}
    assert axes.get_title("left") == "AMD EPYC (AVX2), float32\nfresh memory"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["N1 C8\nnchw"]
    assert pictures.speed_ups([]) is None


def test_the_roofline_has_the_rate_of_each_row_under_the_copys():
    figure = pictures.roofline([GPU])
    (axes,) = figure.axes
    megabytes, rates = axes.lines[1].get_xydata().T.tolist()  # after those of float32
    assert megabytes == pytest.approx([40, 80, 440]) and rates == [4000] * 3  # MB = GB/s times us / 1000
    assert axes.lines[0].get_xdata() == pytest.approx([4])
    assert axes.lines[-1].get_ydata()[0] == 4300 and axes.texts[0].get_text() == "a copy: 4,300 GB/s"
    assert pictures.roofline([{**GPU, "copy_gb_per_s": None}]) is None


def test_curves_are_drawn_along_each_size_that_three_cases_share():
    def case(N=32, C=512, L="", us=1.0):
        return rows(f"N{N}-C{C}-nchw-float32{L}", ours=us)

    line = [*case(64, us=2.0), *case(us=1.0), *case(128, us=4.0)]
    assert pictures.scaling([{**CPU, "rows": line[:2]}]) is None
    (axes,) = pictures.scaling([{**CPU, "rows": [*line, *case(C=1024)]}]).axes
    assert axes.lines[0].get_xydata().tolist() == [[32, 0.001], [64, 0.002], [128, 0.004]]
    assert axes.get_title("left") == "AMD EPYC (AVX2)\nfresh memory\nC512 nchw float32"
    classes = [*case(), *case(L="-L8"), *case(L="-L100", us=3.0)]
    (axes,) = pictures.scaling([{**CPU, "rows": classes}]).axes
    assert axes.lines[0].get_xydata().tolist() == [[7, 0.001], [8, 0.001], [100, 0.003]]


def test_memory_is_shown_over_the_gradient_and_the_floor():
    def row(contender, held, over):
        return {"case": "N1-C8-nchw-float32", "contender": contender, "both": None, "peak_extra_bytes": held,
                "bytes_over_floor": over}  # fmt: skip

    measured = [row("ours", 150, 1.02), row("identity", 100, 1.0), row("released", 800, 18.0)]
    held, moved = pictures.memory([{**CPU, "rows": measured}]).axes
    assert _bars(held) == [1.5, 1.0, 8.0] and _bars(moved) == [1.02, 1.0, 18.0]
    assert pictures.memory([CPU]) is None


def test_the_parts_of_a_step_are_shares():
    (axes,) = pictures.step([STEP]).axes
    assert _bars(axes) == [25.0, 0.0, 75.0, 0.0, 0.0]
    assert "75.0 %" in [text.get_text() for text in axes.texts]
    assert pictures.step([]) is None


def _png(result):
    return pictures.png(pictures.speed_ups([result]))


def _as_drawn_by(content, software, pixel=None):
    image, words = Image.open(io.BytesIO(content)), PngInfo()
    words.add_text("Description", image.info["Description"])
    words.add_text("Software", software)
    if pixel:
        image.putpixel((0, 0), pixel)
    out = io.BytesIO()
    image.save(out, "png", pnginfo=words, compress_level=1)
    return out.getvalue()


def test_a_picture_stands_as_long_as_it_shows_the_same(tmp_path):
    old = _png(CPU)
    assert old == _png(CPU)  # nothing of a run is in it
    software = Image.open(io.BytesIO(old)).info["Software"]
    compressed = _as_drawn_by(old, software)
    assert compressed != old and pictures.same(compressed, old)
    assert pictures.same(_as_drawn_by(old, software, pixel=(250, 255, 250, 255)), old)  # white but for rounding
    assert not pictures.same(_as_drawn_by(old, software, pixel=(240, 255, 255, 255)), old)
    assert pictures.same(_as_drawn_by(old, "another version", pixel=(1, 2, 3, 255)), old)
    other = {**CPU, "rows": rows("N1-C8-nchw-float32", ours=2000, identity=1601, plain=4100, released=30000)}
    assert not pictures.same(_as_drawn_by(_png(other), "another version"), old)
    (tmp_path / "a.png").write_bytes(compressed)
    assert pictures.draw({"a.png": pictures.speed_ups([CPU])}, tmp_path) == {"a.png": compressed}


@pytest.fixture(scope="module")
def generated():
    return report.generated()


def test_the_files_are_what_the_command_writes(generated):
    assert not report.stale(generated), "run: python -m bench report"


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """The report of one result, in a folder of its own."""
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(page, "found", lambda: _found([CPU]))
    report.README.write_text(f"{report.BEGIN} stale {report.END}")
    return tmp_path


def test_report_check_names_what_is_stale_missing_or_left_over(elsewhere, capsys):
    def check():
        status = main(["report", "--check"])
        return status, [line.split()[1] for line in capsys.readouterr().err.splitlines()]

    names = ["README.md", "benchmark.md", "benchmark.html", "speed-ups.png", "roofline.png"]
    assert check() == (1, names)
    assert list(elsewhere.iterdir()) == [report.README]  # nothing is written
    assert main(["report"]) == 0 and check() == (0, [])
    picture = elsewhere / "docs/benchmark/roofline.png"
    picture.with_name("old.png").write_bytes(b"")
    picture.write_bytes(_as_drawn_by(picture.read_bytes(), "Matplotlib 0"))
    assert check() == (1, ["benchmark.html", "old.png"])  # the page holds the picture that stands
    html = elsewhere / "docs/benchmark.html"
    assert main(["report"]) == 0 and check() == (0, [])
    html.write_text(html.read_text().replace("2.05×", "2.06×", 1))
    assert check() == (1, ["benchmark.html"])


def test_the_page_asks_for_nothing_else(generated):
    text = generated[report.DOCS / "benchmark.html"].decode()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert text.count('src="data:image/png;base64,') == text.count("<img") == len(list(page.drawn(page.found())))


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed (Debian: chromium-headless-shell)")
def test_the_page_in_a_browser(generated, tmp_path):
    text = generated[report.DOCS / "benchmark.html"].decode()
    seen = browser.look(text, tmp_path, (400, 1400))
    assert seen.console == []
    for frame, width in zip(seen.frames, (400, 1400), strict=True):
        assert frame["width"] == width == frame["content"]
        assert frame["beyond"] == [] and frame["broken"] == 0 and frame["height"] > 3000


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed (Debian: chromium-headless-shell)")
def test_the_browser_sees_what_is_wrong(tmp_path):
    wide = '<div style="width: 500px">a</div><img src="data:image/png;base64,AAAA"><script>console.error("no")</script>'
    seen = browser.look(f"<body>{wide}</body>", tmp_path, (400, 1400))
    assert [frame["content"] > frame["width"] for frame in seen.frames] == [True, False]
    assert len(seen.frames[0]["beyond"]) == 1 and seen.frames[0]["broken"] == 1
    assert any("no" in line for line in seen.console)
