"""The report: docs/benchmark.md, one HTML page, their pictures and the README's line, from the newest result files."""

from __future__ import annotations

from pathlib import Path

from . import document, goals, page, pictures, results
from .page import Found
from .results import ROOT

README, DOCS = ROOT / "README.md", ROOT / "docs"
LINK = "docs/benchmark.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PICTURES = "benchmark"  #: folder beside the page


def speed_line(found: Found) -> str:
    """The README's sentence: the range of our speed-ups over the cases of the dtype that the goals judge."""
    faster: dict[str, list[str]] = {}
    for result in found.headline:
        where, memory = f"bfloat16, {pictures.where(result)}", ""
        if result["kind"] == "cpu":
            where = f"float32, {result['device']}, {results.capability(result)}, {result['threads']} threads"
            where += pictures.earlier(result)
            memory = f" with {result['memory']} memory"
        plain, best, released = (page.speed(result, name) for name in (goals.PLAIN, goals.BEST, goals.RELEASED))
        faster.setdefault(where, []).append(f"{plain}, {best} and {released} as fast{memory}")
    line = ""
    if faster:
        figures = "; ".join(f"{' and '.join(figures)} ({where})" for where, figures in faster.items())
        line = (
            "Against plain PyTorch and its best formulation, both under `torch.compile`, and against the released "
            f"formulation, the head's forward and backward are {figures}. "
        )
    return f"{line}[Every case, and the goals that are not met]({LINK})."


def insert(readme: str, section: str) -> str:
    """The README with ``section`` between the markers.

    >>> insert(f"a {BEGIN} old {END} z", "new") == f"a {BEGIN}\\nnew\\n{END} z"
    True
    """
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def generated() -> dict[Path, bytes]:
    """What each file must be; the pictures' folder has no others."""
    found = page.found()
    with pictures.settings():
        drawn = pictures.draw(page.drawn(found), DOCS / PICTURES)
    blocks = page.blocks(found, drawn)
    return {
        README: insert(README.read_text(), speed_line(found)).encode(),
        DOCS / "benchmark.md": document.markdown(blocks, PICTURES).encode(),
        DOCS / "benchmark.html": document.page("rebalfer_kernels: benchmark", blocks, drawn).encode(),
        **{DOCS / PICTURES / name: content for name, content in drawn.items()},
    }


def stale(wanted: dict[Path, bytes]) -> list[Path]:
    """The files that differ, are missing, or are pictures of no one."""
    differ = [path for path, content in wanted.items() if not path.exists() or path.read_bytes() != content]
    return differ + sorted(path for path in (DOCS / PICTURES).glob("*.png") if path not in wanted)


def main(check: bool) -> int:
    """Write what differs; or, to ``check``, name it and return 1."""
    import sys

    wanted = generated()
    different = stale(wanted)
    for path in different:
        if check:
            print(f"error: {path.name} is not what `python -m bench report` writes", file=sys.stderr)
        elif path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wanted[path])
        else:
            path.unlink()
    return int(check and bool(different))
