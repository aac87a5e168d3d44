"""One canonical order of the expressions, RAF-DB's, and what folders call them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from ..config import UserError, printable

EXPRESSIONS = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
CANONICAL = (*EXPRESSIONS, "contempt")
ALIASES = {name: name for name in CANONICAL} | {
    "surprised": "surprise",
    "fearful": "fear",
    "afraid": "fear",
    "disgusted": "disgust",
    "happy": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "contemptuous": "contempt",
    "neutrality": "neutral",
}
RAFDB = {str(i + 1): name for i, name in enumerate(EXPRESSIONS)}  # the files of RAF-DB count from 1


def canonical(folder: str) -> str | None:
    """The expression that a folder's name means, or None.

    >>> canonical("0_Angry"), canonical("suprise")
    ('anger', None)
    """
    return ALIASES.get(re.sub(r"^\d+[\W_]+", "", folder.strip()).lower())


def natural(name: str) -> list:
    """A sort key by which 2 comes before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def name_folders(
    folders: Sequence[str], said: Mapping[str, str | None] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Folder -> class in class order, and notes of what was assumed.

    Expressions come in the canonical order, then everything else under its own name in natural order. ``said`` names
    classes of folders; None leaves a folder out. Folders 1 to 7 are RAF-DB's.

    Raises:
        UserError: two folders mean the same class unless both were said to, or ``said`` has a folder that is missing.
    """
    said = dict(said or {})
    if unknown := sorted(set(said) - set(folders)):
        raise UserError(f"data.classes: got {unknown[0]!r}, expected one of the folders {', '.join(sorted(folders))}")
    free = [f for f in folders if f not in said]
    assumed = RAFDB if set(free) == set(RAFDB) else {f: name for f in free if (name := canonical(f))}
    names = {f: name for f in folders if (name := said[f] if f in said else assumed.get(f, printable(f)))}
    for name in set(names.values()):
        if len(same := sorted(f for f in names if names[f] == name and f not in said)) > 1:
            raise UserError(
                f"data: got the folders {' and '.join(same)}, expected one folder for {name}; "
                f"--data.classes '{{{same[0]}: {name}, {same[1]}: {name}}}' joins them"
            )
    order = {name: i for i, name in enumerate(CANONICAL)}
    ordered = sorted(names, key=lambda f: (order.get(names[f], len(order)), natural(names[f])))
    return {f: names[f] for f in ordered}, _notes(free, assumed)


def _notes(free: Sequence[str], assumed: Mapping[str, str]) -> list[str]:
    if assumed is RAFDB:
        meaning = ", ".join(f"{number} {name}" for number, name in RAFDB.items())
        return [f"the folders 1 to 7 are taken for RAF-DB's: {meaning}; --data.classes says otherwise"]
    unmapped = sorted((printable(f) for f in free if f not in assumed), key=natural)
    if not unmapped:
        return []
    texts = []
    for folder in unmapped:
        close = difflib.get_close_matches(folder.lower(), ALIASES, n=1)
        texts.append(f"{folder} (did you mean {ALIASES[close[0]]}?)" if close else folder)
    example = f"--data.classes '{{{unmapped[0]}: CLASS}}' names one, '{{{unmapped[0]}: null}}' leaves it out"
    return [f"folders that name no expression keep their names: {', '.join(texts)}; {example}"]
