"""A hook of mkdocs: files of the repository that pages link to, beyond docs/, become files of the site.

Pages are read in the repository, too, where such links lead to the files themselves. A link to a directory leads to nothing in a
site, and only its text is left.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

_LINK = re.compile(r"\[(?P<text>[^][]*(?:\[[^][]*\][^][]*)*)\]\(\.\./(?P<path>[^)#\s]+)(?:#[^)]*)?\)")


def _place(path: str) -> str:
    """Where a file stands in the site: as text, for it is shown and not rendered."""
    return f"source/{path}" if Path(path).suffix in (".json", ".txt", ".svg", ".png") else f"source/{path}.txt"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them. A link to what is not there stays as it is, and is told by mkdocs."""
    linked = {found["path"] for page in files.documentation_pages() for found in _LINK.finditer(page.content_string)}
    for path in sorted(linked):
        if (ROOT / path).is_file():
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leads links to them."""

    def lead(found: re.Match[str]) -> str:
        if (ROOT / found["path"]).is_file():
            return f"[{found['text']}]({_place(found['path'])})"
        return found["text"] if (ROOT / found["path"]).is_dir() else found[0]

    return _LINK.sub(lead, markdown)
