"""The site made of docs/: built as `make site` does it, without a dead link; each page has its place."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.documents import DOCS, PAGES, ROOT

MKDOCS = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # with --quiet it would count no warnings


class Config(yaml.SafeLoader):
    """Of mkdocs.yml, whose tags name functions."""


Config.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def build(config: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [*MKDOCS, "--config-file", str(config), "--site-dir", str(site)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def in_nav(entry: Any) -> list[str]:
    """The pages of an entry of `nav`."""
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in in_nav(inner)]


def test_every_page_has_one_place() -> None:
    placed = in_nav(yaml.load((ROOT / "mkdocs.yml").read_text(), Config)["nav"])  # noqa: S506
    assert sorted(PAGES) == sorted(placed), f"put into `nav` of mkdocs.yml: {sorted(set(PAGES) - set(placed))}"


def test_it_is_built_without_a_dead_link_and_asks_nobody(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in PAGES:
        text = (tmp_path / page).with_suffix(".html").read_text()
        for target in re.findall(r'href="(source/[^"#]+)"', text):
            assert (tmp_path / target).is_file()
        assert not re.findall(r'<(?:script|img)[^>]+src="https?:|<link rel="stylesheet" href="https?:', text), page
    assert (tmp_path / "source" / "deploy" / "helm" / "enginehouse" / "values.yaml.txt").exists()
    assert not list(tmp_path.rglob("*.py"))


def test_dead_links_are_told(tmp_path: Path) -> None:
    dead = ("nowhere.md", "index.md#nowhere-here", "../examples/nowhere.py")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Title\n\n" + " ".join(f"[a]({link})" for link in dead))
    config = {"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": "docs", "nav": ["index.md"], "theme": {"name": "mkdocs"}}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**config, "hooks": [str(DOCS / "site_links.py")]}))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1 and all(f"'{link}'" in done.stderr for link in dead), done.stderr
