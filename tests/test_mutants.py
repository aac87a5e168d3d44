"""Every injected fault of tests/mutants applies to the sources as they are; ``make mutants`` injects them."""

from support import child


def test_every_row_applies():
    checked = child.run("tests/mutants", "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
