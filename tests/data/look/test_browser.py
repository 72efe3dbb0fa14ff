"""The page in a real browser: it renders, its script runs, and nothing of the data does."""

from __future__ import annotations

import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.cli.main import main
from tests.data.look.pages import write_sets

pytestmark = pytest.mark.unit

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[int, list[str]]]:
    """A server that the hostile text names; its port, and what it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, paths
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, asked: tuple[int, list[str]]) -> Path:
    if not BROWSER:
        pytest.skip("needs Chromium, which is not installed (Debian: apt-get install chromium)")
    folder = write_sets(tmp_path_factory.mktemp("page"), port=asked[0])
    assert main(["data", "show", str(folder / "mix.yaml"), "--out", str(folder / "p.html")]) == 0
    return folder / "p.html"


def browse(page: Path, *options: str) -> tuple[str, str]:
    """(standard output, what the page's console and the browser said of it)."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-extensions", "--disable-background-networking",
        "--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}", *options,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    said = done.stderr.decode(errors="replace").splitlines()
    return done.stdout.decode(), "\n".join(line for line in said if "CONSOLE" in line)


def driven(page: Path, script: str) -> str:
    """The page's DOM after a script of the test's own, which its policy is widened for."""
    content = page.read_text(encoding="utf-8")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    content = content.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    path = page.with_name("driven.html")
    path.write_text(content.replace("</body>", f"<script>{script}</script></body>"))
    dom, console = browse(path, "--dump-dom")
    assert console == ""
    return dom


def test_it_renders(page: Path, asked: tuple[int, list[str]]) -> None:
    dom, console = browse(page, "--dump-dom")
    assert console == ""
    assert re.search(r"<title>[^<]*mix\.yaml: rows 0 to 1</title>", dom)
    # The page's own script has run; none of the data's has.
    assert re.search(r'<div id="where"[^>]*>Point at a token', dom)
    assert '<img src="http' not in dom and "<link" not in dom
    assert dom.count("<script>") == 1 and dom.count("<article") == 8
    assert asked[1] == []


def test_the_browser_reads_the_same_tokens_as_the_file(page: Path) -> None:
    dom, _ = browse(page, "--dump-dom")
    spans = r'data-ids="[^"]*"'
    assert re.findall(spans, dom) == re.findall(spans, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_no_blank_sheet(page: Path, tmp_path: Path, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    # 0: dark, 1: light.
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(page, f"--screenshot={shot}", "--window-size=900,1400", "--hide-scrollbars", scheme)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (1400, 900, 3)
    gray = pixels.mean(axis=2)
    assert (np.median(gray) < 80) == dark
    # Text all the way down, green for what is learned, and the noise of pictures.
    ink = np.abs(gray - np.median(gray)) > 60
    assert (ink.reshape(7, 200, 900).sum(axis=(1, 2)) > 300).all()
    green = (pixels[..., 1] - pixels[..., 0] > 8) & (pixels[..., 1] - pixels[..., 2] > 4)
    assert green.sum() > 2000


def test_keys_and_buttons(page: Path) -> None:
    dom = driven(page, """
      const press = (key) => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      const where = document.getElementById("where"), told = [];
      const tell = () => told.push(where.textContent);
      press("j"); press("ArrowRight"); tell(); press("ArrowRight"); tell();
      press("j"); press("ArrowRight"); press("ArrowRight"); tell();
      press("k"); told.push(document.activeElement.getAttribute("aria-label"));
      const view = document.querySelector(".view"); view.click();
      told.push(view.getAttribute("aria-pressed"));
      const box = document.querySelector("input[name=grid]"); box.click();
      told.push(document.body.className);
      document.body.dataset.told = JSON.stringify(told);
    """)  # fmt: skip
    found = re.search(r'data-told="([^"]*)"', dom)
    assert found
    told = found[1].replace("&quot;", '"')
    assert "row 0 \u00b7 token 0 of the row \u00b7 position 0 \u00b7 id 260 \u00b7 context" in told
    assert f"token 1 of the row \u00b7 position 1 \u00b7 id {ord('p')} \u00b7 context" in told
    # The second sample is a question that begins with its picture: 3 x 2 tokens.
    assert re.search(r"token \d+-\d+ of the row \u00b7 position 1-6 \u00b7 id 258 x 6", told)
    assert "picture 1" in told
    assert '"tokens of row 0 from 0","true","grid"' in told
