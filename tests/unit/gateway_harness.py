"""A gateway with a store, a small tokenizer and mock executors, all on one event loop."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from mock_executor import MockExecutor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engine import token_table
from engine.directory import DirectoryStore
from engine.errors import EnginehouseError
from gateway.admission import DEFAULT_LIMITS, Limits
from gateway.failover import Failover
from gateway.router import Router
from gateway.server import Gateway
from protos.access import EVERYBODY, Access
from protos.rpc import ErrorInterceptor, from_rpc_error
from protos.v1.gateway_pb2 import GenerateRequest, GenerateResponse
from protos.v1.gateway_pb2_grpc import GatewayStub, add_GatewayServicer_to_server
from tests import tokenizer_engine

VOCAB_SIZE, MAX_SEQ_LEN = 512, 100_000
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE that was shown no emoji: each one is four tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the quick brown fox says naïve café"] * 5, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("é!", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """As sentencepiece models come from Hugging Face (Llama 2): words with a leading space, bytes for the rest."""
    words = ["▁", "▁▁", "▁hello", "▁world", "hello", "a", "é", "!", "\ufffd"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def publish(
    store: DirectoryStore,
    name: str,
    template: str | None = TEMPLATE,
    tokenizer: str | None = None,
    table: bytes | None = None,
) -> str:
    """An engine of which nothing is real but the tokenizer, and the table of token bytes that is given; its id."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    files = {
        "tokenizer.json": (tokenizer or byte_level().to_str()).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    files |= {token_table.FILE: table} if table else {}
    identity = {"name": name, "template": template}
    return tokenizer_engine.publish(store, name, files, identity, VOCAB_SIZE, MAX_SEQ_LEN)


class Cluster:
    """Attributes: store, engine_id of the model "demo", the executors, the gateway, its router and a client's stub."""

    def __init__(self, store: DirectoryStore, engine_id: str, executors: list[MockExecutor]) -> None:
        self.store = store
        self.engine_id = engine_id
        self.executors = executors
        self.executor = executors[0]
        self.router = Router([executor.address for executor in executors])
        self.stub: Any = None
        self.gateway: Gateway

    def generate(self, **fields: Any) -> "grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse]":
        timeout = fields.pop("timeout", None)
        metadata = fields.pop("metadata", None)
        if not {"text", "token_ids", "chat"} & fields.keys():
            fields["text"] = "hello"
        return self.stub.Generate(GenerateRequest(**{"model": "demo"} | fields), timeout=timeout, metadata=metadata)

    async def ready(self, count: int) -> None:
        await eventually(lambda: self.router.ready(self.engine_id) == count)


@asynccontextmanager
async def cluster(
    path: Path,
    executors: int = 1,
    limits: Limits = DEFAULT_LIMITS,
    access: Access = EVERYBODY,
    patience: float = 30,
) -> AsyncIterator[Cluster]:
    """`patience`: of requests that have lost their executor."""
    store = DirectoryStore(path)
    engine_id = publish(store, "demo")
    mocks = [MockExecutor(engine_id) for _ in range(executors)]
    for mock in mocks:
        await mock.start()
    made = Cluster(store, engine_id, mocks)
    server = grpc.aio.server(interceptors=[ErrorInterceptor(access=access)])
    made.gateway = Gateway(store, made.router, limits=limits, failover=Failover(made.router, patience))
    add_GatewayServicer_to_server(made.gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made.router.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            made.stub = GatewayStub(channel)
            await made.ready(executors)
            yield made
    finally:
        await server.stop(None)
        await made.router.stop()
        for mock in mocks:
            await mock.stop()


async def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def collect(call: Any) -> tuple[str, list[int], GenerateResponse]:
    """All text, all token ids and the last message."""
    text, token_ids, last = "", [], GenerateResponse()
    while (response := await asyncio.wait_for(call.read(), 60)) is not grpc.aio.EOF:
        assert not last.HasField("finish")
        text, last = text + response.text, response
        token_ids += response.token_ids
    return text, token_ids, last


async def failure(call: Any) -> EnginehouseError:
    """The error that the call ends with."""
    try:
        await (collect(call) if hasattr(call, "read") else call)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the call did not fail")
