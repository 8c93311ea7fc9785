"""What a shell completes beside options: names of models and ids of engines, from the store at hand.

Called at every Tab: imports no torch and no grpc, asks no network (of a store in S3 nothing is completed), and an error is
no completion.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

Items = list[CompletionItem]
_SHORT = 12  # digits of an engine id that are offered; commands take any unambiguous beginning


def _quiet(complete: Callable[[click.Context, str], Items]) -> Callable[..., Items]:
    def run(context: click.Context, _: click.Parameter, incomplete: str) -> Items:
        with contextlib.suppress(Exception):
            return complete(context, incomplete)
        return []

    return run


@_quiet
def complete_model(context: click.Context, incomplete: str) -> Items:
    """Names of models."""
    return [CompletionItem(name) for name in _names(context) if name.startswith(incomplete)]


@_quiet
def complete_engine(context: click.Context, incomplete: str) -> Items:
    """Names of models, and ids of engines."""
    names = [CompletionItem(name, help="model") for name in _names(context) if name.startswith(incomplete)]
    ids = [path.stem for path in _folder(context).joinpath("engines").glob(f"{incomplete}*.json")]
    return names + [CompletionItem(i if len(incomplete) > _SHORT else i[:_SHORT], help="engine") for i in sorted(ids)]


@_quiet
def complete_directory(_: click.Context, incomplete: str) -> Items:
    """Directories, which the shell finds."""
    return [CompletionItem(incomplete, type="dir")]


@_quiet
def complete_model_or_directory(context: click.Context, incomplete: str) -> Items:
    """Directories, and what stands for an engine."""
    return [CompletionItem(incomplete, type="dir"), *complete_engine(context, None, incomplete)]


@_quiet
def complete_gpu(_: click.Context, incomplete: str) -> Items:
    """Known GPUs."""
    from enginehouse.gpus import GPUS

    names = [*GPUS, "list"]
    return [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]


def _names(context: click.Context) -> list[str]:
    """Names that stand for something, by the newest record of each. Read plainly: threads would cost more than they save."""
    import msgspec

    from engine.registry import NameRecord

    found = []
    for folder in sorted(_folder(context).glob("models/*/")):
        records = sorted(folder.glob("*.json"))
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            if records and msgspec.json.decode(records[-1].read_bytes(), type=NameRecord).engine_id:
                found.append(folder.name)
    return found


def _folder(context: click.Context) -> Path:
    """The store: the one that was typed, else the running cluster's, else that of the data folder."""
    from enginehouse.home import Home

    typed: dict[str, object] = {}
    at: click.Context | None = context
    while at is not None:
        typed = {name: value for name, value in at.params.items() if value} | typed
        at = at.parent
    data = typed.get("data")
    home = Home.find(str(data) if data else None)
    if store := typed.get("store"):
        url = str(store)
    else:
        running = home.running()
        url = running.store if running else home.store
    if url.startswith("file://"):
        from urllib.parse import unquote, urlsplit

        return Path(unquote(urlsplit(url).path))
    if "://" in url:
        raise ValueError(url)  # a network is not asked at a Tab
    return Path(url).expanduser()
