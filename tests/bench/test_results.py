"""What a result file holds of the machine that wrote it."""

from pathlib import Path

from bench import results


def test_a_result_names_no_place_of_the_machine(tmp_path, monkeypatch):
    results.environment("cpu")  # what it needs is built, if it has to be, where it belongs
    monkeypatch.setenv("REBALFER_CACHE_DIR", str(results.ROOT / "kept"))
    path = results.write(results.environment("cpu"), tmp_path / "op.json")
    text = path.read_text()
    assert '"REBALFER_CACHE_DIR": "kept"' in text and not (results.ROOT / "kept").exists()
    assert str(results.ROOT) not in text and str(Path.home()) + "/" not in text


def test_a_cpu_that_is_held_to_an_instruction_set_hides_none_that_has_it(tmp_path):
    native = {"kind": "cpu", "device": "EPYC", "capability": "AVX2", "memory": "fresh", "settings": {}, "quiet": True}
    variables = {"REBALFER_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
    for of in ("short", "curves"):
        for settings in ({}, {"REBALFER_CPU_ISA": "avx2"}, variables):
            result = native | {"settings": settings, "set": of, "date": str(len(settings)), "rows": []}
            results.write(result, tmp_path / results.file_name("op", result))
    for newest in (results.newest_cpu, results.newest_more):
        assert [results.capability(x) for x in newest(tmp_path)] == ["AVX2", "held to AVX2"]
