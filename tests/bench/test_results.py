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
