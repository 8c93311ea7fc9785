"""From a model's name to its engine, its limits and its tokenizer, out of the store."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from engine import blobs, registry
from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound
from engine.manifest import FileRef, Manifest
from engine.store import Store
from gateway.cache import Cache
from gateway.tokenizer import NoTokenizer, Tokenizer, TokenizerConfig

_NAME_TTL = 2.0  # seconds until a name that was given to another engine is noticed
_KEPT_HISTORY = 3  # of a name's engines
_KEPT_TOKENIZERS = 32  # some 50 MB each for a vocabulary of 150,000
_KEPT_ENGINES = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Engine:
    """What is kept of a manifest; chunk digests make the whole one large."""

    vocab_size: int
    max_seq_len: int
    tokenizer: FileRef | None
    config: TokenizerConfig
    has_token_table: bool


@dataclass(frozen=True)
class Model:
    """What the gateway knows of an engine under one of its names."""

    name: str
    engine_id: str
    vocab_size: int
    max_seq_len: int
    has_chat_template: bool
    has_tokenizer: bool = True
    has_token_table: bool = True  # by which output is guided


class Models:
    """Reads the store in threads, and what it has read once it keeps.

    A name that was given to another engine goes on with the one before until an executor has the new one.

    Args:
        ready: how many executors can take a request for an engine.
    """

    def __init__(self, store: Store, ready: Callable[[str], int]) -> None:
        self._store = store
        self._ready = ready
        self._names = Cache(self._read_name, _KEPT_ENGINES, _NAME_TTL)
        self._engines = Cache(self._read_engine, _KEPT_ENGINES)
        self._tokenizers = Cache(self._read_tokenizer, _KEPT_TOKENIZERS)

    async def get(self, name: str, shown: Callable[[str], bool] = lambda _: True) -> Model:
        """The model of a name. Raises NotFound with the names there are, of which `shown` says whether they are told."""
        if not name:
            known = ", ".join(filter(shown, await asyncio.to_thread(registry.names, self._store))) or "none yet"
            raise InvalidArgument(f"no model given: set `model`; there are: {known}", reason="MODEL_MISSING")
        try:
            engine_ids = await self._names.get(name)
        except NotFound:
            raise await asyncio.to_thread(registry.unknown_name, self._store, name, shown) from None
        engine_id = next(filter(self._ready, engine_ids), engine_ids[0])
        engine = await self._engines.get(engine_id)
        return Model(
            name=name,
            engine_id=engine_id,
            vocab_size=engine.vocab_size,
            max_seq_len=engine.max_seq_len,
            has_chat_template=engine.config.chat_template is not None,
            has_tokenizer=engine.tokenizer is not None,
            has_token_table=engine.has_token_table,
        )

    async def tokenizer(self, engine_id: str) -> Tokenizer:
        """The engine's tokenizer. Raises FailedPrecondition if it cannot be read."""
        return await self._tokenizers.get(engine_id)

    async def list(self) -> list[Model]:
        """Every name whose engine can be read; the others are logged."""
        names = await asyncio.to_thread(registry.names, self._store)
        found = await asyncio.gather(*(self.get(name) for name in names), return_exceptions=True)
        for name, model in zip(names, found, strict=True):
            if isinstance(model, EnginehouseError):
                log.warning("model %s: %s", name, model.message)
            elif isinstance(model, BaseException):
                raise model
        return [model for model in found if isinstance(model, Model)]

    def _read_name(self, name: str) -> tuple[str, ...]:
        """The engines that a name stands for and has stood for lately, newest first."""
        return tuple(registry.recent_engines(self._store, name, _KEPT_HISTORY))

    def _read_engine(self, engine_id: str) -> _Engine:
        manifest = registry.manifest(self._store, engine_id)
        config = _config(self._store, manifest)
        file = _tokenizer_file(manifest, "tokenizer.json") if config else None
        return _Engine(
            manifest.model.vocab_size,
            manifest.limits.max_seq_len,
            file,
            config or TokenizerConfig(),
            manifest.token_table is not None,
        )

    def _read_tokenizer(self, engine_id: str) -> Tokenizer:
        return open_tokenizer(self._store, registry.manifest(self._store, engine_id))


def open_tokenizer(store: Store, manifest: Manifest) -> Tokenizer:
    """An engine's tokenizer. Raises FailedPrecondition if it cannot be read."""
    config = _config(store, manifest)
    if config is None:
        return NoTokenizer(manifest.engine_id)
    return Tokenizer(blobs.read(store, _tokenizer_file(manifest, "tokenizer.json")), config)


def _config(store: Store, manifest: Manifest) -> TokenizerConfig | None:
    """None for an engine without a tokenizer."""
    if not manifest.tokenizer:
        return None
    data = blobs.read(store, _tokenizer_file(manifest, "tokenizer_config.json"))
    try:
        return TokenizerConfig.from_json(data)
    except msgspec.MsgspecError as error:
        raise FailedPrecondition(
            f"tokenizer_config.json of engine {manifest.engine_id[:12]} cannot be read ({error}): build the engine again",
            reason="TOKENIZER_INVALID",
        ) from None


def _tokenizer_file(manifest: Manifest, name: str) -> FileRef:
    for file in manifest.tokenizer:
        if file.name == name:
            return file
    raise FailedPrecondition(
        f"engine {manifest.engine_id[:12]} has no {name}: build it again", reason="TOKENIZER_MISSING"
    )
