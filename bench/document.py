"""A document of headings, paragraphs, tables and pictures, as Markdown and as one self-contained HTML page.

Text is Markdown's inline notation: `code`, **strong**, [text](address). The page has no script and asks for nothing
else: pictures are inside, the style is in its head.
"""

from __future__ import annotations

import base64
import html
import re
from typing import NamedTuple


class Heading(NamedTuple):
    level: int  #: 1 is the document's
    text: str


class Code(NamedTuple):
    text: str


class Figures(NamedTuple):
    """A few numbers that a reader should see first; a line of text each where there are no boxes."""

    boxes: list[tuple[str, str]]  #: figure and what it is


class Table(NamedTuple):
    header: list[str]
    lines: list[list[str]]
    folded: str = ""  #: the summary under which the page folds it


class Picture(NamedTuple):
    name: str  #: of the file, in the document's folder of pictures
    text: str  #: what it shows: its caption, and in its place where it cannot be seen


Block = str | Heading | Code | Figures | Table | Picture


def markdown(blocks: list[Block], folder: str) -> str:
    """With pictures in ``folder``.

    >>> print(markdown([Heading(2, "A"), Table(["x"], [["1 | 2"]])], ""), end="")
    ## A
    <BLANKLINE>
    | x |
    | --- |
    | 1 \\| 2 |
    """
    return "\n\n".join(_as_markdown(block, folder) for block in blocks) + "\n"


def _as_markdown(block: Block, folder: str) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Code():
            return f"```\n{block.text}\n```"
        case Figures():
            return "\n".join(f"- **{figure}** {what}" for figure, what in block.boxes)
        case Table():
            table = markdown_table(block.header, block.lines)
            return f"<details><summary>{block.folded}</summary>\n\n{table}\n\n</details>" if block.folded else table
        case Picture():
            return f"![{block.text}]({folder}/{block.name})"
    return block


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rows = (header, ["---"] * len(header), *lines)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def page(title: str, blocks: list[Block], pictures: dict[str, bytes]) -> str:
    """One HTML file with all pictures, PNG by name, inside."""
    body = "\n".join(_as_html(block, pictures) for block in blocks)
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


def _as_html(block: Block, pictures: dict[str, bytes]) -> str:
    match block:
        case Heading():
            anchor = re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-")
            return f'<h{block.level} id="{anchor}">{inline(block.text)}</h{block.level}>'
        case Code():
            return f"<pre><code>{html.escape(block.text)}</code></pre>"
        case Figures():
            boxes = "".join(f"<li><b>{inline(figure)}</b> {inline(what)}</li>" for figure, what in block.boxes)
            return f'<ul class="figures">{boxes}</ul>'
        case Table():
            return _table(block)
        case Picture():
            data = base64.b64encode(pictures[block.name]).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(block.text)}">'
            return f'<figure><div class="picture">{image}</div><figcaption>{inline(block.text)}</figcaption></figure>'
    return f"<p>{inline(block)}</p>"


def _table(table: Table) -> str:
    columns = list(zip(*table.lines, strict=True)) or [()] * len(table.header)
    words = [i == 0 and any(" " in cell for cell in column) or any(_worded(cell) for cell in column)
             for i, column in enumerate(columns)]  # fmt: skip

    def row(tag: str, cells: list[str]) -> str:
        starts = [f'<{tag} class="words">' if of_words else f"<{tag}>" for of_words in words]
        return "<tr>" + "".join(f"{a}{inline(b)}</{tag}>" for a, b in zip(starts, cells, strict=True)) + "</tr>"

    head, rows = row("th", table.header), "\n".join(row("td", line) for line in table.lines)
    whole = f'<div class="wide"><table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>'
    return f"<details><summary>{inline(table.folded)}</summary>{whole}</details>" if table.folded else whole


def _worded(cell: str) -> bool:
    """Whether it is words, which stand on the left and may be broken into lines, and no number with its unit.

    >>> [_worded(cell) for cell in ("AMD EPYC, fresh memory", "at most 1.5×", "2.58× (1 of 4 cases)", "met")]
    [True, False, False, False]
    """
    return " " in cell and not any(character.isdigit() for character in cell.partition(",")[0])


def inline(text: str) -> str:
    """A paragraph's notation as HTML.

    >>> inline("`a<b>` is **met**, [see](x.md)")
    '<code>a&lt;b&gt;</code> is <strong>met</strong>, <a href="x.md">see</a>'
    """
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """\
:root { --ink: #1d232b; --soft: #5b6673; --line: #dfe4ea; --wash: #f5f7f9; --ours: #c2410c; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.6 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 2rem 1.25rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.45rem; margin: 3rem 0 .75rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
a { color: #1d4ed8; }
code { background: var(--wash); padding: .1em .3em; border-radius: 4px; font-size: .9em; }
pre { background: var(--wash); padding: .9rem 1rem; border-radius: 8px; overflow-x: auto; line-height: 1.45; }
pre code { padding: 0; background: none; }
.figures { list-style: none; padding: 0; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); }
.figures li { border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; color: var(--soft);
  line-height: 1.4; font-size: .95rem; }
.figures b { display: block; color: var(--ours); font-size: 1.6rem; line-height: 1.3; }
.wide { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--wash); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
th.words, td.words { text-align: left; white-space: normal; min-width: 11rem; }
td strong { color: #b91c1c; }
tr:last-child td { border-bottom: 0; }
tbody tr:hover { background: var(--wash); }
figure { margin: 1.5rem 0; }
.picture { overflow-x: auto; }
img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; margin: .5rem 0 0; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--soft); }
"""
