"""The table of a study as files: Markdown, CSV and pictures."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint
from . import pictures, table


def write(folder: Path, found: table.Table) -> list[str]:
    """Their names; a picture that would show nothing is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"table.md": table.markdown(found), "table.csv": table.as_csv(found)}
    for name, content in texts.items():
        checkpoint.write(folder / name, content)
    drawn = {"table.png": pictures.accuracies, "curves.png": pictures.curves}
    return [*texts, *(name for name, draw in drawn.items() if draw(folder / name, found))]
