"""The search for Triton tiles, with a clock that is made up."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench import tune
from bench.__main__ import main
from bench.cases import Case
from rebalfer_kernels.triton import tiles as triton_tiles

PROBLEM = triton_tiles.Problem(512, 49, 7, True, torch.bfloat16, "sm_90")


def test_the_best_tiles_of_each_pass_are_proposed_and_the_table_takes_them():
    def milliseconds(kind, row):
        assert triton_tiles.policy(PROBLEM).forward.channels == 128  # not changed by what is only proposed
        if kind == "forward":
            return 1.0 if (row.forward, row.pool_by_mma) == ((64, 8, 2), False) else 2.0
        return {(256, 4): 0.5, (64, 4): float("inf")}.get(row.backward, 3.0)

    row, times = tune.search(PROBLEM, milliseconds)
    assert row == triton_tiles.Row("sm_90", True, 2, 64, forward=(64, 8, 2), backward=(256, 4))
    assert times == {"forward": [2.0, 1.0], "backward": [3.0, 0.5]}
    before = triton_tiles.policy(PROBLEM)
    with tune.first(row):
        cut = triton_tiles.policy(PROBLEM)
    assert cut.forward[1:] == (64, 8, 8, 2) and cut.backward.channels == 256 and not cut.pool_by_mma
    assert triton_tiles.policy(PROBLEM) == before


def test_both_passes_have_their_share_of_the_time(monkeypatch):
    tried = []
    monkeypatch.setattr(tune.time, "monotonic", lambda: 100.0 + len(tried))  # each try is a second
    tune.search(PROBLEM, lambda kind, row: tried.append(kind) or 1.0, end=119.5)
    assert tried == ["forward"] * 15 + ["backward"] * 5


def test_what_is_best_when_the_time_is_up_is_proposed(capsys):
    row, times = tune.search(PROBLEM, lambda kind, row: 2.0, end=0.0)
    assert row == next(tune.rows(PROBLEM))[1] and times == {"forward": [2.0, 2.0], "backward": [2.0, 2.0]}
    assert capsys.readouterr().out.count("2.0000 ms: Row(") == 2


def test_every_candidate_is_compiled_ahead_once_for_a_small_batch(monkeypatch):
    compiled = []
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    monkeypatch.setattr(tune, "_compile", lambda case, rows: compiled.extend((case.N, row) for row in rows))
    candidates = [row for _, row in tune.rows(PROBLEM)]
    tune.compile_ahead(Case(512, 2048, "channels_last", torch.bfloat16), candidates)
    assert Counter(compiled) == Counter((2, row) for row in candidates)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the present GPU would be searched")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["tune"]) == 2
    assert "no GPU" in capsys.readouterr().err
