"""Injects one fault at a time into the sources; a named test must catch each.

    python tests/mutants            all of them, some minutes
    python tests/mutants flip cuda  those whose description or file name holds one of the words
    python tests/mutants --check    runs nothing: prints each row that no longer applies to the sources

Each fault is injected into a copy of the tree, whose native part is built unoptimised into a cache of its own (copies
share the object files whose preprocessed sources are equal). The named tests must first pass on a copy without a fault.
Exit status 1 if a fault is not caught or a row does not apply.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tables import MUTANTS
from tables.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
TREE = ("rebalfer_kernels", "csrc", "bench", "tests", "pyproject.toml")
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec g++ "$@"
case "$*" in *" -c "*) ;; *) exec g++ "$@" -O0 ;; esac
for out; do :; done
g++ "$@" -E -P && key=$(sha256sum < "$out" | cut -c 1-32) || exit 1
[ -e {objects}/$key ] || { g++ "$@" -O0 -o {objects}/$key.$$ && mv {objects}/$key.$$ {objects}/$key; } || exit 1
cp {objects}/$key "$out"
"""


def copy(work: str) -> Path:
    to = Path(tempfile.mkdtemp(dir=work))
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


def run(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status and output; the tree's own cache, so that no library with a fault outlives it."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-rs", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    environment = _environment(tree, interpret=all(_interpreted(test) for test in tests))
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def _environment(tree: Path, interpret: bool) -> dict[str, str]:
    objects = tree.parent / "objects"
    objects.mkdir(exist_ok=True)
    compiler = tree / "g++-unoptimised"
    compiler.write_text(COMPILER.replace("{objects}", str(objects)))
    compiler.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("REBALFER_", "PYTHONPATH"))}
    ours = {"REBALFER_CACHE_DIR": str(tree / "cache"), "CXX": str(compiler), "OMP_NUM_THREADS": "1"}
    return kept | ours | {"TRITON_INTERPRET": str(int(interpret))}


def _interpreted(test: str) -> bool:
    return "triton" in test


def kill(mutant: Mutant, work: str) -> tuple[str, float]:
    """ "killed", or what happened instead, and the seconds it took."""
    start = time.monotonic()
    tree = copy(work)
    mutant.inject(tree)
    status, output = run(tree, [mutant.test])
    shutil.rmtree(tree)
    # 1: a test failed; 0: none did, or all were skipped; anything else is no verdict (no such test, ...).
    verdict = {0: "SURVIVED", 1: "killed"}.get(status, f"pytest exited with {status}")
    # The last is the emulator's compiler.
    if any(f"building the {part} failed" in output for part in ("CPU kernels", "C++ autograd")) or " -x c++ " in output:
        verdict = "does not compile"
    return verdict if verdict == "killed" else f"{verdict}\n{output[-1500:]}", time.monotonic() - start


def failure_without_a_fault(tests: set[str], work: str) -> str:
    """What pytest printed if the tests do not pass on the tree as it is; empty if they do."""
    interpreted = sorted(filter(_interpreted, tests))
    built = ["test_native.py::test_it_builds_here", "test_native.py::test_the_autograd_builds_here"]
    native = [*built, *sorted(tests - set(interpreted))]
    for part in (native, interpreted):
        status, output = run(copy(work), part) if part else (0, "")
        if status != 0:
            return output[-5000:]
    return ""


def kill_all(mutants: list[Mutant]) -> int:
    """The exit status; prints one line for each fault."""
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        if failure := failure_without_a_fault({m.test for m in mutants}, work):
            print(f"without any fault the tests do not pass:\n{failure}")
            return 1
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(kill, mutants, [work] * len(mutants))
            for mutant, (verdict, seconds) in zip(mutants, results, strict=True):
                survivors += verdict != "killed"
                print(f"{mutant.what:70} {mutant.test.split('::')[-1]:50} {seconds:4.0f} s  {verdict}", flush=True)
    print(f"{len(mutants)} faults, {survivors} not killed")
    return int(survivors > 0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults whose description or file name holds one of them")
    parser.add_argument("--check", action="store_true", help="only print the rows that do not apply to the sources")
    options = parser.parse_args(arguments)
    mutants = [m for m in MUTANTS if not options.words or any(w in f"{m.what} {m.file}" for w in options.words)]
    if problems := [problem for m in mutants if (problem := m.problem(ROOT))]:
        print("\n".join(problems))
        return 1
    if options.check:
        return 0
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        for mutant in (m for m in mutants if m.avx512):
            print(f"{mutant.what:70} left out: this CPU has no AVX-512")
        mutants = [m for m in mutants if not m.avx512]
    return kill_all(mutants)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
