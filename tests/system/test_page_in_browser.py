"""The page in Chromium without a screen: it asks for nothing, says nothing on the console, and fits a phone.

Debian: apt-get install chromium. CI runs it; `make browser` too; `make test` leaves it out.
"""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from run_records import whole_run

from apt.runs.report import report

pytestmark = pytest.mark.browser

WIDTHS = (390, 1280)  # a phone, a laptop
# The page stands in frames as wide as the screens: the window of Chromium cannot be as narrow as a phone.
HARNESS = """<!DOCTYPE html><title>harness</title><script>
const found = {}, waiting = [];
function look(width) {
  const frame = document.createElement('iframe');
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.src = PAGE;
  waiting.push(new Promise(done => frame.onload = () => {
    const page = frame.contentDocument, view = frame.contentWindow;
    const wide = [...page.querySelectorAll('body *')].filter(e => e.closest('.scroll, pre') === null
        && e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 80));
    const images = [...page.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width]);
    const boxes = [...page.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length;
    found[width] = {view: view.innerWidth, scroll: page.documentElement.scrollWidth, wide, images, boxes,
        requests: view.performance.getEntriesByType('resource').map(e => e.name)};
    done();
  }));
  document.documentElement.append(frame);
}
WIDTHS.forEach(look);
Promise.all(waiting).then(() => {
  const text = document.createElement('pre'); text.id = 'found'; text.textContent = JSON.stringify(found);
  document.documentElement.replaceChildren(text);
});
</script>"""


@dataclass(frozen=True)
class Seen:
    """What the browser did."""

    views: dict[str, Any]  # by width
    console: list[str]


def browse(page: Path, folder: Path) -> Seen:
    """Open a page at both widths."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser is not None, "no Chromium here: apt-get install chromium, or leave the marker `browser` out"
    harness = folder / "harness.html"
    text = HARNESS.replace("PAGE", json.dumps(page.as_uri())).replace("WIDTHS", json.dumps(WIDTHS))
    harness.write_text(text, encoding="utf-8")
    flags = [
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--allow-file-access-from-files", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"),
    ]
    command = [browser, *flags, harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return Seen(json.loads(unescaped), [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def many_runs(folder: Path) -> Path:
    """A folder of runs whose tables are wider than a phone."""
    whole_run(folder / "lora_with_a_long_name_that_nobody_would_give", method="lora", sparsity=0.0)
    whole_run(folder / "apt")
    return folder


@pytest.mark.parametrize("several", [False, True], ids=["run", "folder"])
def test_the_page_fits_and_is_quiet(several: bool, tmp_path: Path) -> None:
    folder = many_runs(tmp_path / "grid") if several else whole_run(tmp_path / "run", data="long" * 40)
    seen = browse(report(folder), tmp_path)
    assert seen.console == []
    for width in WIDTHS:
        view = seen.views[str(width)]
        assert view["view"] == width
        assert view["requests"] == []
        assert view["scroll"] <= width
        assert view["wide"] == []
        assert view["images"]
        for natural, shown in view["images"]:
            assert natural > 0  # it was drawn
            assert shown >= 320
    assert seen.views["390"]["boxes"] > 0  # wide tables scroll in their own box


def test_a_page_that_is_wrong_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    body = '<div style="width:900px">wide</div><img src="http://example.invalid/x.png"><script>nothing()</script>'
    page.write_text(f"<!DOCTYPE html><body>{body}</body>", encoding="utf-8")
    seen = browse(page, tmp_path)
    assert any("nothing is not defined" in line for line in seen.console)
    assert seen.views["390"]["scroll"] > 390
    assert seen.views["390"]["wide"]
    assert seen.views["390"]["requests"] == ["http://example.invalid/x.png"]
