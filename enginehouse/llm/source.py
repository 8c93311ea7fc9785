"""What a person calls a model, and the engine that is meant: found, or built."""

from pathlib import Path
from typing import TYPE_CHECKING, Union
from urllib.parse import urlsplit, urlunsplit

from engine import registry
from engine.artifact import Engine, is_engine_dir
from engine.backends import TRANSFER_PATIENCE, open_store
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.store import Store
from enginehouse.home import Home
from enginehouse.progress import Bars

if TYPE_CHECKING:
    from builder_svc.build_config import BuildConfig
    from builder_svc.causal_lm import CausalLM
    from builder_svc.quant_config import QuantConfig

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
    build_config: "BuildConfig",
    *,
    store: str | None,
    revision: str | None,
    quant_config: "QuantConfig | None",
    keep: bool,
    bars: Bars,
) -> Engine:
    """Builds a checkpoint or a model of the Python API, or finds what an earlier build has made of the same.

    Args:
        keep: put it into the store, by default that of the person's data folder; else it goes with the result.
    """
    try:
        from builder_svc.checkpoint.sources import fetch_here
        from builder_svc.pipeline import build
        from builder_svc.quant_config import check_not_asked
        from builder_svc.work_directory import WorkDirectory, clear
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"to build an engine in this process needs {error.name}: pip install 'enginehouse[builder]', or give an engine",
            reason="EXTRA_MISSING",
        ) from None
    check_not_asked(quant_config)
    source = None
    if isinstance(model, str | Path):
        model, source = fetch_here(model, revision, weights=not build_config.dummy_weights, progress=bars.update)
    if isinstance(model, Engine):
        raise InvalidArgument(f"{model} is built")
    if not keep:
        return build(model, build_config, source=source, progress=bars.update)
    home = Home.find()
    home.make()
    clear(home.work)
    opened: Store = open_store(store or home.store, TRANSFER_PATIENCE)
    with WorkDirectory(home.work) as work:
        return build(model, build_config, store=opened, source=source, work_dir=work, progress=bars.update)


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
