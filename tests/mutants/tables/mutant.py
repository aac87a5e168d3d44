"""One row of the tables: a fault, where it is injected, and the test that must catch it."""

from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    what: str
    file: str
    old: str  #: occurs exactly once in the file
    new: str
    test: str  #: must fail; perhaps one of its cases, in brackets
    avx512: bool = False  #: only a CPU with AVX-512 shows it by this test

    def inject(self, tree: Path) -> None:
        """Replaces the old text in a copy of the checkout."""
        file = tree / self.file
        file.write_text(file.read_text().replace(self.old, self.new))

    def problem(self, tree: Path) -> str:
        """Why the row does not apply to a checkout; empty if it does."""
        file, (test_file, _, test) = tree / self.file, self.test.partition("[")[0].partition("::")
        occurrences = file.read_text().count(self.old) if file.exists() else 0
        if occurrences != 1:
            return f"{self.what}: the old text occurs {occurrences} times in {self.file}, expected once"
        path = tree / "tests" / test_file
        if not path.exists() or f"def {test}" not in path.read_text():
            return f"{self.what}: there is no test {self.test}"
        return ""
