"""A cluster of real processes with mutual TLS on every hop and API keys at its gateway; no secret in what it logs."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import openai
import pytest

from engine.errors import EnginehouseError, PermissionDenied, Unauthenticated, Unavailable
from enginehouse import LLM, SamplingParams, key_file
from enginehouse.certificates import generate
from enginehouse.client import BuilderClient, ExecutorClient, GatewayClient
from enginehouse.credentials import Given, find
from enginehouse.home import ClusterState, Home
from protos.rpc import CHANNEL_OPTIONS
from protos.v1 import common_pb2 as pb
from protos.v1.gateway_pb2 import TokenizeRequest

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"

pytestmark = pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo checkpoint is not there")


@dataclass
class Secured:
    """A running cluster, with the secrets that it was given."""

    state: ClusterState
    home: Home
    certs: Path
    keys: Path
    secrets: list[str]
    client: dict[str, str]  # a client's certificate


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    root = tmp_path_factory.mktemp("secure")
    certs, keys, home = root / "certs", root / "keys.json", Home(root / "home")
    generate(certs, ["127.0.0.1"])
    operator = key_file.add(keys, "operator").secret
    guest = key_file.add(keys, "guest", models=("other-*",)).secret
    (root / "operator.key").write_text(operator)
    command = [sys.executable, "-m", "enginehouse", "--api-key-file", str(root / "operator.key"), "up", f"demo={DEMO}"]
    command += [
        "--port",
        "0",
        "--json",
        "--certs",
        str(certs),
        "--api-keys",
        str(keys),
        "--metrics",
        "--data",
        str(home.root),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ENGINEHOUSE_")}
    with (root / "up.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told, (root / "up.log").read_text()
        assert json.loads(told)["models"]
        state = home.running()
        assert state is not None
        client = {
            "tls_ca": f"{certs}/ca.pem",
            "tls_cert": f"{certs}/client.pem",
            "tls_key": f"{certs}/client-key.pem",
        }
        yield Secured(state, home, certs, keys, [operator, guest], client)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        process.stdout.close()


def refused(kind: type[EnginehouseError], client: GatewayClient | BuilderClient | ExecutorClient) -> str:
    """What a service says to a client that it does not let in."""

    async def ask() -> None:
        async with client:
            if isinstance(client, GatewayClient):
                await client.models()
            elif isinstance(client, BuilderClient):
                await client.builds()
            else:
                await client.status()

    with pytest.raises(kind) as told:
        asyncio.run(ask())
    return told.value.message


def test_only_who_is_known_gets_in(cluster: Secured) -> None:
    state, ca = cluster.state, {"tls_ca": f"{cluster.certs}/ca.pem"}
    gateway_s = {"tls_cert": f"{cluster.certs}/gateway.pem", "tls_key": f"{cluster.certs}/gateway-key.pem"}
    assert "if it speaks TLS" in refused(Unavailable, GatewayClient(state.gateway))
    assert "no API key" in refused(Unauthenticated, GatewayClient(state.gateway, **ca))
    assert "is not known" in refused(Unauthenticated, GatewayClient(state.gateway, **ca, api_key="eh_guessed"))
    for closed in (ExecutorClient(state.executors[0], **ca), BuilderClient(state.builder, **ca)):
        assert "may want a client certificate" in refused(Unavailable, closed)
    assert "says 127.0.0.1, gateway may not call ListBuilds" in refused(
        PermissionDenied, BuilderClient(state.builder, **ca, **gateway_s)
    )

    async def let_in() -> None:
        async with ExecutorClient(state.executors[0], **cluster.client) as executor:
            assert len((await executor.status()).engines) == 1
        async with BuilderClient(state.builder, **cluster.client) as builder:
            assert len(await builder.builds()) == 1

    asyncio.run(let_in())
    for url in state.metrics.values():
        with urllib.request.urlopen(url) as page:
            found = re.search(
                rb"^enginehouse_tls_certificate_expires_timestamp_seconds (\S+)", page.read(), re.MULTILINE
            )
        assert found and 364 * 86400 < float(found[1]) - time.time() < 366 * 86400


def test_a_tenant_sees_and_uses_its_models_alone(cluster: Secured) -> None:
    operator, guest = cluster.secrets[:2]
    ca = f"{cluster.certs}/ca.pem"

    async def ask(key: str) -> tuple[list[str], str]:
        async with GatewayClient(cluster.state.gateway, api_key=key, tls_ca=ca) as gateway:
            names = [model.name for model in await gateway.models()]
            greedy = {"sampling": pb.SamplingParams(temperature=0), "stopping": pb.StoppingCriteria(max_tokens=8)}
            texts = [response.text async for response in gateway.generate("demo", "In the beginning", **greedy)]
            return names, "".join(texts)

    names, text = asyncio.run(ask(operator))
    assert names == ["demo"] and text
    with pytest.raises(PermissionDenied, match="tenant 'guest' may not use model 'demo'"):
        asyncio.run(ask(guest))

    async def shown() -> list[str]:
        async with GatewayClient(cluster.state.gateway, api_key=guest, tls_ca=ca) as gateway:
            return [model.name for model in await gateway.models()]

    assert asyncio.run(shown()) == []
    with LLM.connect(cluster.state.gateway, "demo", api_key=operator, tls_ca=ca) as llm:
        made = llm.generate("In the beginning", SamplingParams(max_tokens=4))
        assert len(made.outputs[0].token_ids) == 4


def test_http_asks_for_the_same_keys_over_the_same_tls(cluster: Secured) -> None:
    assert cluster.state.http.startswith("https://127.0.0.1:")
    trusted = ssl.create_default_context(cafile=f"{cluster.certs}/ca.pem")

    def client(key: str) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(verify=trusted)
        return openai.OpenAI(base_url=f"{cluster.state.http}/v1", api_key=key, http_client=http, max_retries=0)

    operator, guest = cluster.secrets
    with client(operator) as known:
        assert [model.id for model in known.models.list()] == ["demo"]
        assert known.completions.create(model="demo", prompt="And God", max_tokens=4).usage is not None
    with client(guest) as known:
        assert [model.id for model in known.models.list()] == []
        with pytest.raises(openai.PermissionDeniedError, match="may not use model 'demo'"):
            known.completions.create(model="demo", prompt="And God", max_tokens=4)
    with client("eh_wrong") as unknown, pytest.raises(openai.AuthenticationError):
        unknown.models.list()
    with client(operator) as known:  # who opens the page has no key yet
        assert known._client.get(f"{cluster.state.http}/").status_code == 200
        assert known._client.get(f"{cluster.state.http}/status").status_code == 401


def test_what_is_too_large_or_asks_how_the_service_looks_is_refused(cluster: Secured) -> None:
    credentials = find(Given(api_key=cluster.secrets[0], tls_ca=f"{cluster.certs}/ca.pem"))

    async def ask() -> list[str]:
        found = []
        async with credentials.channel(cluster.state.gateway, CHANNEL_OPTIONS) as channel:
            large = TokenizeRequest(model="demo", text="a" * 17 * 1024 * 1024).SerializeToString()
            for method, data in (
                ("enginehouse.v1.Gateway/Tokenize", large),
                ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", b""),
                ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b""),
            ):
                try:
                    await channel.unary_unary(f"/{method}")(data)
                except grpc.aio.AioRpcError as error:
                    found.append(error.code().name)
        return found

    assert asyncio.run(ask()) == ["RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "UNIMPLEMENTED"]


def test_garbage_at_the_ports_changes_nothing(cluster: Secured) -> None:
    """Bytes that are no TLS, some of it, or HTTP; connections that are left open, or reset."""
    numbers, state = random.Random(1), cluster.state
    hello = bytes.fromhex("16030100c8010000c40303")  # the beginning of a handshake
    left = []
    for number in range(60):
        host, _, port = (state.gateway, state.builder, state.executors[0])[number % 3].rpartition(":")
        one = socket.create_connection((host, int(port)), timeout=60)
        begin = (b"", hello, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n")[number % 4]
        one.sendall(begin + numbers.randbytes(numbers.choice((1, 100, 5000))))
        if number % 5:
            one.close()
        else:
            left.append(one)
    ca = f"{cluster.certs}/ca.pem"

    async def still() -> None:
        async with GatewayClient(state.gateway, api_key=cluster.secrets[0], tls_ca=ca) as gateway:
            assert [model.ready_executors for model in await gateway.models()] == [1]
        async with BuilderClient(state.builder, **cluster.client) as builder:
            assert len(await builder.builds()) == 1
        async with ExecutorClient(state.executors[0], **cluster.client) as executor:
            assert len((await executor.status()).engines) == 1

    asyncio.run(still())
    for one in left:
        one.close()


def test_keys_are_replaced_while_the_gateway_runs(cluster: Secured) -> None:
    """The next one is known before the last one is not: no call in between fails."""
    ca = f"{cluster.certs}/ca.pem"

    async def knows(key: str) -> bool:
        async with GatewayClient(cluster.state.gateway, api_key=key, tls_ca=ca) as gateway:
            try:
                await gateway.models()
            except Unauthenticated:
                return False
            return True

    async def becomes(key: str, known: bool) -> None:
        async with asyncio.timeout(60):
            while await knows(key) is not known:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    first = key_file.add(cluster.keys, "rotating")
    asyncio.run(becomes(first.secret, True))
    second = key_file.add(cluster.keys, "rotating")
    asyncio.run(becomes(second.secret, True))
    assert asyncio.run(knows(first.secret))
    key_file.revoke(cluster.keys, first.kept.id)
    asyncio.run(becomes(first.secret, False))
    assert asyncio.run(knows(second.secret))
    cluster.secrets += [first.secret, second.secret]


def test_no_secret_is_in_a_log(cluster: Secured) -> None:
    """Last: after every secret has been used, rightly and wrongly."""
    assert len(cluster.secrets) == 4
    for key in ("gateway", "executor", "builder", "client", "ca"):
        body = (cluster.certs / f"{key}-key.pem").read_text().splitlines()[1]
        cluster.secrets.append(body)
    logs = [*cluster.home.logs.iterdir(), cluster.home.root.parent / "up.log", cluster.home.state_file]
    assert len(logs) == 5
    for path in logs:
        said = path.read_text()
        assert not [secret[:6] for secret in cluster.secrets if secret in said or secret[3:] in said], path
    gateway = (cluster.home.logs / "gateway.log").read_text()
    assert "tenant=operator" in gateway and "API_KEY_UNKNOWN" in gateway
    assert "ssl_transport_security" not in gateway  # grpc's own lines, of each handshake that fails
