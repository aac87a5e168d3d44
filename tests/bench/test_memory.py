"""What a process begins with reaches it: malloc's rules, an instruction set. Page faults are those of the head."""

import json
import mmap
import types

import pytest
from support import child
from support.machine import ISAS_HERE

from bench import __main__ as command_line
from bench import memory, results, step
from bench.__main__ import main


class Touching:
    """A training whose step touches this many pages for the first time in each of its parts."""

    PAGES = {"views": 300, "backbone forward": 200, "head": 64, "backbone backward": 500, "optimiser": 0}

    def __init__(self, *_, **__):
        self.kept = []

    def parts(self, mark):
        for i, part in enumerate(step.PARTS):
            pages = mmap.mmap(-1, max(1, self.PAGES[part]) * mmap.PAGESIZE)
            pages.madvise(mmap.MADV_NOHUGEPAGE)
            for page in range(self.PAGES[part]):
                pages[page * mmap.PAGESIZE] = 1
            self.kept.append(pages)
            if i < len(step.PARTS) - 1:
                mark()


def test_the_faults_are_those_of_the_head(monkeypatch):
    monkeypatch.setattr(step, "Training", Touching)
    assert memory.head_faults(step.REHEARSAL, warm_up=1, steps=3) == pytest.approx(64, abs=5)


def test_three_processes_count_with_their_rules(monkeypatch, tmp_path, capsys):
    counts = {"none": 900, "fresh": 1000, "reused": 10}
    asked = []

    def run(command, env, **_):
        rules = {key: value for key, value in env.items() if key.startswith("MALLOC_")}
        asked.append({"131072": "fresh", "0": "reused"}[next(iter(rules.values()))] if rules else "none")
        assert rules == memory.RULES.get(asked[-1], {})
        assert command[1:4] == ["-m", "bench", "memory"] and command[-2:] == ["--rehearse", "--count"]
        assert command[command.index("--batch-size") + 1] == "5"
        return types.SimpleNamespace(stdout=json.dumps(counts[asked[-1]]))

    monkeypatch.setattr(memory.subprocess, "run", run)
    monkeypatch.setattr(results, "environment", lambda kind: {"kind": kind, "device": "EPYC", "capability": "AVX2"})
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert main(["memory", "--rehearse", "--batch-size", "5", "--out", str(tmp_path)]) == 0
    assert asked == ["none", "fresh", "reused"]
    (path,) = tmp_path.iterdir()
    assert path.name == "memory-resnet10t-rehearsal-epyc.json"
    read = json.loads(path.read_text())
    assert (read["faults"], read["seen"], read["config"]["batch_size"]) == (counts, "fresh", 4)
    assert results.newest_by_backbone("memory", tmp_path) == []  # a rehearsal is no result
    assert "memory is fresh" in capsys.readouterr().out


class Started(Exception):
    """With this environment."""


@pytest.mark.skipif("avx2" not in ISAS_HERE, reason="this CPU has no AVX2")
def test_a_benchmark_may_be_held_to_an_instruction_set(monkeypatch):
    def begin(program, arguments, environment):
        raise Started(environment)

    monkeypatch.setattr(command_line.os, "execve", begin)
    environments = []
    for isa in ([], ["--isa", "avx2"]):
        with pytest.raises(Started) as caught:
            main(["op", "--memory", "reused", *isa])
        environments.append(caught.value.args[0])
    plain, held = environments
    variables = command_line.ISAS["avx2"]
    assert not variables.items() & plain.items() and variables.items() <= held.items()
    code = """
import torch
from rebalfer_kernels import native
from torch._inductor.cpu_vec_isa import pick_vec_isa
native.load("cpu")
print(torch.ops.rebalfer_kernels.cpu_isa(), torch.backends.cpu.get_cpu_capability(), pick_vec_isa())
"""
    run = child.run("-c", code, **variables)
    assert run.stdout.split() == ["avx2", "AVX2", "avx2"], run.stderr
