"""Headless Chromium, where there is one: screenshots, and what it laid out where."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no chromium here (Debian's package `chromium`): the page is not looked at"

MEASURE = """
<script>
function box(e) { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; }
function text(e) { return e.tagName + ': ' + (e.textContent || '').trim().slice(0, 40); }
function look(frame) {
  const d = frame.contentDocument, root = d.documentElement, wide = root.clientWidth;
  const every = selector => [...d.querySelectorAll(selector)];
  const label = (t, svg) => ({
    text: t.textContent, box: box(t),
    size: parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
  });
  return {
    width: wide,
    overflow: root.scrollWidth - wide,
    beyond: every('body *').filter(e => !e.closest('.scroll, svg') && box(e)[2] > wide + 1).map(text),
    cut: every('td, th, dt, dd, p, h1, h2, h3, h4, figcaption, li, summary')
      .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(text),
    scrolled: every('.scroll').filter(e => !e.closest('figure') && e.scrollWidth > e.clientWidth + 1).map(text),
    charts: every('figure > svg, .course > svg').map(svg => ({
      name: svg.getAttribute('aria-label'), box: box(svg), marks: svg.querySelectorAll('path, use').length,
      texts: [...svg.querySelectorAll('text')].map(t => label(t, svg)),
    })),
    titles: every('figcaption, h2, h3, h4').map(e => e.textContent.trim()),
    empty: every('section, figure, .tiles, .words, table, .pair > div, article')
      .filter(e => !e.textContent.trim()).map(e => e.outerHTML.slice(0, 80)),
  };
}
onload = () => {
  const told = [...document.querySelectorAll('iframe')].map(look);
  document.getElementById('told').textContent = JSON.stringify(told);
};
</script>
"""


def chromium(*arguments: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    """Run it once."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    flags += ["--disable-extensions", "--no-first-run", "--virtual-time-budget=4000"]
    return subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=timeout)


def screenshot(page: Path, to: Path, *, width: int, height: int, dark: bool = False) -> Path:
    """A picture of the page's top."""
    told = [f"--window-size={width},{height}", f"--screenshot={to}"]
    told += ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(*told, page.as_uri())
    return to


def printed(page: Path, to: Path) -> Path:
    """The page as a PDF."""
    chromium(f"--print-to-pdf={to}", "--no-pdf-header-footer", page.as_uri())
    return to


def measured(page: Path, widths: list[int]) -> list[dict[str, Any]]:
    """What the browser laid out where, at each width.

    The page allows no script, so a page around it looks into it.
    """
    frames = "".join(
        f'<iframe src="{page.name}" style="width:{width}px;height:900px;border:0"></iframe>' for width in widths
    )
    around = page.with_name("around.html")
    around.write_text(f'<!doctype html>{MEASURE}{frames}<pre id="told"></pre>')
    done = chromium("--allow-file-access-from-files", "--disable-web-security", "--dump-dom", around.as_uri())
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None, done.stderr
    assert found[1], done.stderr
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    told: list[dict[str, Any]] = json.loads(text)
    return told
