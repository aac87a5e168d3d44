"""A page in headless Chromium, at several widths: what runs over its sides, and what the console says."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)

#: Reports, of each frame, its width, that of what is in it, and elements beyond its edge that nothing scrolls.
REPORT = """
function scrolled(element) {
  for (let e = element.parentElement; e; e = e.parentElement)
    if (getComputedStyle(e).overflowX !== 'visible' && e !== e.ownerDocument.body) return true;
  return false;
}
window.onload = () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const root = frame.contentDocument.documentElement;
    const beyond = [...root.querySelectorAll('body *')].filter(
      e => e.getBoundingClientRect().right > frame.clientWidth + 1 && !scrolled(e));
    const broken = [...root.querySelectorAll('img')].filter(image => !image.naturalWidth);
    return {width: frame.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
            beyond: beyond.map(e => e.outerHTML.slice(0, 80)), broken: broken.length};
  });
  const shown = document.createElement('output');
  shown.textContent = JSON.stringify(found);
  document.body.replaceChildren(shown);
};
"""


class Seen(NamedTuple):
    frames: list[dict]  #: for each width: width, content, height, beyond, broken (pictures that do not load)
    console: list[str]


def look(page: str, folder: Path, widths: tuple[int, ...]) -> Seen:
    """Load ``page`` once for each width, side by side, in a browser that asks the network for nothing."""
    frames = "".join(
        f'<iframe style="border: 0" width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>'
        for width in widths
    )
    harness = folder / "harness.html"
    harness.write_text(f"<!doctype html><meta charset='utf-8'><script>{REPORT}</script><body>{frames}</body>")
    command = [
        PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions",
        "--no-first-run", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.DOTALL)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), console)
