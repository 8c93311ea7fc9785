"""What a person calls a model, and the engine that is meant: found, or built."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Union
from urllib.parse import urlsplit, urlunsplit

from builder_svc.build_config import BuildConfig
from builder_svc.checkpoint.sources import fetch_here
from builder_svc.recall import build_key, recall, remember
from builder_svc.work_directory import WorkDirectory, clear
from engine import registry
from engine.artifact import Engine, is_engine_dir
from engine.backends import TRANSFER_PATIENCE, open_store
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.store import Store
from enginehouse.home import Home
from enginehouse.progress import Bars

if TYPE_CHECKING:
    from builder_svc.causal_lm import CausalLM

Model = Union[str, Path, Engine, "CausalLM"]  # noqa: UP007  (a name in quotes)


def find_built(model: Model, store: str | None) -> Engine | None:
    """The engine, if it is built: an Engine, an engine directory, s3://BUCKET/PREFIX/NAME, or a name in a store.

    Args:
        store: where names are looked for; by default the store of the person's data folder.

    Raises:
        NotFound: a URL, or a path, behind which nothing is.
        InvalidArgument: a URL without a name.
        EnginehouseError: what the store raises.
    """
    if isinstance(model, Engine):
        return model
    if not isinstance(model, str | Path):
        known = sys.modules.get("builder_svc.causal_lm")  # there, if it is one: it imports torch
        if known is None or not isinstance(model, known.CausalLM):
            raise InvalidArgument(
                f"model is {model!r}: give a path, a name, an Engine or a model of AutoModelForCausalLM (a ModelConfig is for "
                "enginehouse.hlapi.LLM)"
            )
        return None
    text = str(model)
    if urlsplit(text).scheme in ("s3", "file"):
        url, name = _split(text)
        return _named(open_store(url, TRANSFER_PATIENCE), name)
    path = Path(text).expanduser()
    if is_engine_dir(path):
        return Engine.from_dir(path)
    if path.exists() or "/" in text:
        return None
    place = store or Home.find().store
    if store is None and not (Home.find().root / "store").is_dir():
        return None
    opened = open_store(place, TRANSFER_PATIENCE)
    try:
        return _named(opened, text)
    except NotFound as error:
        raise NotFound(
            f"{text!r} is no directory, and no model in {opened.url}: {error.message}. Give a checkpoint, an engine directory, "
            "ORG/NAME of the hub, or a name of the store",
            reason="MODEL_NOT_FOUND",
        ) from None


def build_engine(
    model: Model,
    build_config: BuildConfig,
    *,
    store: str | None,
    revision: str | None,
    keep: bool,
    bars: Bars,
) -> Engine:
    """Builds a checkpoint or a model of the Python API, or finds what an earlier build has made of the same.

    Args:
        keep: put it into the store, by default that of the person's data folder; else it goes with the result.
    """
    if isinstance(model, Engine):
        raise InvalidArgument(f"{model} is built")
    source = None
    if isinstance(model, str | Path):
        model, source = fetch_here(model, revision, weights=not build_config.dummy_weights, progress=bars.update)
    home = Home.find()
    opened = open_store(store or home.store, TRANSFER_PATIENCE) if keep else None
    key = build_key(model, build_config) if isinstance(model, Path) else None
    if opened and key and (found := _recalled(key, opened)):
        return found
    try:
        from builder_svc.pipeline import build  # imports torch, which takes seconds
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"to build an engine in this process needs {error.name}: pip install 'enginehouse[builder]', or give an engine",
            reason="EXTRA_MISSING",
        ) from None
    if not opened:
        return build(model, build_config, source=source, progress=bars.update)
    home.make()
    clear(home.work)
    with WorkDirectory(home.work) as work:
        engine = build(model, build_config, store=opened, source=source, work_dir=work, progress=bars.update)
    if key:
        remember(key, engine.engine_id)
    return engine


def _recalled(key: str, store: Store) -> Engine | None:
    """The engine that the same build has given before, if the store has all of it."""
    engine_id = recall(key)
    manifest = registry.find_manifest(store, engine_id) if engine_id else None
    if manifest is None or registry.missing_files(store, manifest):
        return None
    return Engine(store, manifest, reused=True)


def _named(store: Store, name: str) -> Engine:
    return Engine(store, registry.manifest(store, registry.find_engine(store, name)))


def _split(url: str) -> tuple[str, str]:
    """A store's URL and the name behind it."""
    parts = urlsplit(url)
    place, _, name = parts.path.rstrip("/").rpartition("/")
    if not name or (parts.scheme == "file" and not place):
        raise InvalidArgument(
            f"{url!r} names no model: write the store's URL, a slash and the model's name, such as s3://BUCKET/PREFIX/NAME",
            reason="MODEL_MISSING",
        )
    return urlunsplit((parts.scheme, parts.netloc, place, parts.query, "")), name
