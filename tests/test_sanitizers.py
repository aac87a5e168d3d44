"""The CPU kernels under AddressSanitizer and UBSan, without torch: sanitize/driver.cpp for each instruction set."""

import shlex
import subprocess

import pytest
from support.machine import ISAS_HERE, ROOT

from rebalfer_kernels import native

SANITIZE = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"  # -O3 would compile for minutes
ISAS = [isa for isa in native.ISAS if isa in ISAS_HERE]


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """All of them at once, as if by the library's own recipe but for the flags of SANITIZE."""
    try:
        recipe, compiler = native.cpu_recipe(), native.find_compiler()
    except native.ToolMissing as error:
        pytest.skip(str(error))
    work = tmp_path_factory.mktemp("sanitize")
    empty = work / "empty.cpp"
    empty.write_text("int main() {}\n")
    trial = [*compiler, *SANITIZE.split(), empty, "-o", work / "empty"]
    if subprocess.run(trial, capture_output=True).returncode:
        pytest.skip(f"{shlex.join(compiler)} cannot build with {SANITIZE}")
    running = {}
    for isa in ISAS:
        flags = f"{recipe.flags} {recipe.objects[f'{isa}.o'][1]} {SANITIZE}".split()
        command = [*compiler, *flags, "-I", ROOT / "csrc", ROOT / "tests/sanitize/driver.cpp", "-o", work / isa]
        running[isa] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield {isa: (process, work / isa) for isa, process in running.items()}
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("isa", native.ISAS)
def test_sanitizers(isa, request):
    if isa not in ISAS:
        pytest.skip(f"this CPU has only {', '.join(ISAS)}")
    build, executable = request.getfixturevalue("builds")[isa]
    message = build.communicate(timeout=500)[0]
    assert build.returncode == 0, message[-5000:]
    result = subprocess.run([executable], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    assert result.stdout.endswith(" checks, 0 failures\n") and int(result.stdout.split()[0]) > 5000
