"""The gateway's page in headless Chromium: it streams, it shows what is going on, and asks nobody else for anything.

Needs extra `browser` and a Chromium: Debian's chromium-headless-shell or chromium, or that of `playwright install chromium`.
With ENGINEHOUSE_SCREENSHOTS=1 the pictures in docs/ are made anew.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enginehouse import key_file
from tests.integration.services import up

playwright = pytest.importorskip("playwright.sync_api", reason="no browser: pip install -e '.[browser]'")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo-model"
DOCS = ROOT / "docs" / "images"
PATIENCE = 60_000  # milliseconds

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo checkpoint is not there"),
]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of keys, and one of them."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    return keys, key_file.add(keys, "me").secret


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, secret: tuple[Path, str]) -> Iterator[str]:
    """Of a cluster that asks for a key."""
    root = tmp_path_factory.mktemp("up")
    keys, key = secret
    (root / "key").write_text(key)
    with up(f"demo={DEMO}", root, ("--api-key-file", str(root / "key")), ("--api-keys", str(keys))) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    with playwright.sync_playwright() as started:
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no browser: apt-get install chromium-headless-shell, or playwright install chromium")
        made = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


def _to_the_last_token(route: Any) -> None:
    """So that what the model would like to say does not decide how long it streams."""
    route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True}))


def test_the_page(browser: Any, url: str, secret: tuple[Path, str]) -> None:
    page = browser.new_page(viewport={"width": 1180, "height": 760})
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda said: wrong.append(said.text) if said.type == "error" and "401" not in said.text else None
    )
    page.set_default_timeout(PATIENCE)
    for path in ("**/v1/completions", "**/v1/chat/completions"):
        page.route(path, _to_the_last_token)
    expect = playwright.expect
    expect.set_options(timeout=PATIENCE)

    page.goto(url)
    expect(page.locator("#state")).to_contain_text("no API key")
    page.fill("#key", secret[1])
    page.locator("#key").blur()
    expect(page.locator("#state")).to_be_empty()
    expect(page.locator("#executors")).to_contain_text("demo (")
    expect(page.locator("#builds")).to_contain_text("succeeded")

    page.select_option("#kind", "text")
    page.fill("#tokens", "160")
    page.fill("#prompt", "In the beginning")
    page.click("#send")
    expect(page.locator("#facts")).to_contain_text("+ 160 tokens, first after")
    assert page.locator("#output").inner_text().startswith("In the beginning")
    expect(page.locator("#p50")).not_to_have_text("-")
    expect(page.locator("#rate")).to_have_text("0")  # it is over
    if os.environ.get("ENGINEHOUSE_SCREENSHOTS"):
        DOCS.mkdir(exist_ok=True)
        page.screenshot(path=DOCS / "page.png")

    page.fill("#tokens", "1900")  # and is stopped while it streams
    page.fill("#prompt", "And God")
    page.click("#send")
    expect(page.locator("#output")).to_have_text(re.compile(r"And God[\s\S]{40}"))
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#streams")).to_have_text("0")
    assert "tokens, first after" not in page.locator("#facts").inner_text()

    page.select_option("#kind", "chat")
    page.click("#clear")
    page.fill("#tokens", "8")
    for turn, said in enumerate(("And God said,", "Let there be"), 1):
        page.fill("#prompt", said)
        page.locator("#prompt").press("Control+Enter")
        expect(page.locator("#output .asked")).to_have_count(turn)
        expect(page.locator("#facts")).to_contain_text("tokens, first after")
    page.fill("#tokens", "5000")
    page.fill("#prompt", "too long")
    page.click("#send")
    expect(page.locator("#output .error")).to_contain_text("lower max_tokens")
    if os.environ.get("ENGINEHOUSE_SCREENSHOTS"):
        page.set_viewport_size({"width": 420, "height": 860})
        page.screenshot(path=DOCS / "page-narrow.png", full_page=True)

    assert all(address.startswith(url) for address in asked if not address.startswith("data:")), asked
    assert [each for each in wrong if "400" not in each] == []
    page.close()
