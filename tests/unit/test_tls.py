"""TLS between real servers and clients of grpc: who gets in, what is said where it fails, certificates that are replaced."""

import functools
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_harness import eventually
from grpc_health.v1 import health, health_pb2_grpc
from mock_executor import MockExecutor

from engine.errors import (
    EnginehouseError,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from enginehouse import key_file
from enginehouse.certificates import generate
from enginehouse.client import GatewayClient
from enginehouse.credentials import Given, find, typed
from gateway.link import Link
from gateway.router import Router
from protos import probe
from protos.access import EVERYBODY, Access, caller
from protos.dial import NONE, Credentials, key_of_file, why_not
from protos.keys import Keyring
from protos.rpc import ErrorInterceptor
from protos.tls import ClientTls, ServerTls, TlsFiles
from protos.v1.gateway_pb2 import ListModelsRequest, ListModelsResponse, Model
from protos.v1.gateway_pb2_grpc import GatewayServicer, GatewayStub, add_GatewayServicer_to_server


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ours, theirs (another authority), elsewhere (for another host), old (of yesterday)."""
    root = tmp_path_factory.mktemp("certs")
    generate(root / "ours", ["127.0.0.1", "localhost"])
    generate(root / "theirs", ["127.0.0.1"])
    generate(root / "elsewhere", ["10.0.0.7", "gateway.example.com"])
    generate(root / "old", ["127.0.0.1"], timedelta(days=-1))
    return root


def pair(directory: Path, service: str, ca: Path | None = None) -> TlsFiles:
    return TlsFiles(directory / f"{service}.pem", directory / f"{service}-key.pem", ca and ca / "ca.pem")


class Servicer(GatewayServicer):
    """Says who has called."""

    async def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        return ListModelsResponse(models=[Model(name=caller().name)])


@asynccontextmanager
async def serving(access: Access = EVERYBODY) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor(access=access)])
    add_GatewayServicer_to_server(Servicer(), server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    place = "127.0.0.1:0"
    bound = (
        server.add_secure_port(place, access.server.credentials()) if access.server else server.add_insecure_port(place)
    )
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(None)


async def called(address: str, **given: Any) -> str:
    """By whom the server says that it was called."""
    async with GatewayClient(address, **given) as client:
        return (await client.models())[0].name


async def test_mutual_tls_lets_in_whom_the_authority_has_signed_and_who_is_named(certs: Path) -> None:
    ours, theirs = certs / "ours", certs / "theirs"
    client = {"tls_ca": f"{ours}/ca.pem", "tls_cert": f"{ours}/client.pem", "tls_key": f"{ours}/client-key.pem"}
    gateway = client | {"tls_cert": f"{ours}/gateway.pem", "tls_key": f"{ours}/gateway-key.pem"}
    async with serving(Access(ServerTls(pair(ours, "gateway", ours)), frozenset(["gateway"]))) as address:
        assert await called(address, **gateway) == ""
        assert await called(address.replace("127.0.0.1", "localhost"), **gateway) == ""
        with pytest.raises(PermissionDenied, match="certificate says client may not call ListModels here"):
            await called(address, **client)
        foreign = {"tls_cert": f"{theirs}/gateway.pem", "tls_key": f"{theirs}/gateway-key.pem"}
        for given in ({"tls_ca": f"{ours}/ca.pem"}, client | foreign):
            with pytest.raises(Unavailable, match="closes the connection: it may want a client certificate"):
                await called(address, **given)


async def test_what_is_wrong_between_two_sides_is_said(certs: Path) -> None:
    ca = {name: f"{certs / name}/ca.pem" for name in ("ours", "theirs", "elsewhere")}
    async with serving(Access(ServerTls(pair(certs / "ours", "gateway")))) as address, serving() as plain:
        assert await called(address, tls_ca=ca["ours"]) == ""
        for where, given, said in (
            (address, {}, "closes the connection: if it speaks TLS, give its authority with --tls-ca"),
            (address, {"tls_ca": ca["theirs"]}, "that the authority in --tls-ca .* has not signed"),
            (address, {"tls_ca": "system"}, "that the authority in --tls-ca .* has not signed"),
            (plain, {"tls_ca": ca["ours"]}, "speaks no TLS: connect without --tls-ca"),
            ("127.0.0.1:1", {"tls_ca": ca["ours"]}, "no gateway answers at 127.0.0.1:1"),
        ):
            with pytest.raises(Unavailable, match=said):
                await called(where, **given)
    async with serving(Access(ServerTls(pair(certs / "elsewhere", "gateway")))) as address:
        with pytest.raises(Unavailable, match="has a certificate for other names"):
            await called(address, tls_ca=ca["elsewhere"])


async def test_a_certificate_that_expires_under_way_is_told_to_the_client(
    certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "protos.tls._check_time", lambda path, certificate: None
    )  # as if it had been good when it was read
    async with serving(Access(ServerTls(pair(certs / "old", "gateway")))) as address:
        with pytest.raises(Unavailable, match="has a certificate that has expired: renew it there"):
            await called(address, tls_ca=f"{certs}/old/ca.pem")


async def test_new_certificates_are_used_without_a_restart(certs: Path, tmp_path: Path) -> None:
    """Of server and client: the connection that stands goes on, the next one has the new ones."""
    files = pair(tmp_path, "gateway", tmp_path)
    install(certs / "ours", tmp_path)
    server, client = ServerTls(files), Credentials(ClientTls(files))
    async with serving(Access(server)) as address, client.channel(address) as standing:
        assert await GatewayStub(standing).ListModels(ListModelsRequest())
        before = client.version
        install(certs / "theirs", tmp_path)
        for watched in (server._pems, client.tls and client.tls._pems):
            assert watched
            watched._looked -= 1  # a second has passed
        assert await GatewayStub(standing).ListModels(ListModelsRequest())
        assert client.version == before + 1
        async with client.channel(address) as fresh:
            assert await GatewayStub(fresh).ListModels(ListModelsRequest())
        with pytest.raises(Unavailable, match="has not signed"):
            await called(address, tls_ca=f"{certs}/ours/ca.pem")
        (tmp_path / "gateway-key.pem").write_text("half of a k")  # whoever replaces files does so one after another
        server._pems._looked -= 1
        assert await called(address, tls_ca=f"{tmp_path}/ca.pem", **client_of(certs / "theirs")) == ""


def install(source: Path, target: Path) -> None:
    for name in ("ca.pem", "gateway.pem", "gateway-key.pem"):
        shutil.copy(source / name, target / name)


def client_of(directory: Path) -> dict[str, str]:
    return {"tls_cert": f"{directory}/client.pem", "tls_key": f"{directory}/client-key.pem"}


async def test_a_gateway_reaches_executors_that_know_it_and_again_with_new_certificates_and_keys(
    certs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.link._LONGEST_PAUSE", 0.1)
    monkeypatch.setattr("protos.watched._INTERVAL", 0.0)
    keys, own = tmp_path / "keys.json", tmp_path / "own.key"
    own.write_text(key_file.add(keys, "gateway").secret)
    install(certs / "ours", tmp_path)
    files, executor = pair(tmp_path, "gateway", tmp_path), MockExecutor("e")

    def access(directory: Path) -> Access:
        return Access(ServerTls(pair(directory, "executor", directory)), frozenset(["gateway"]), Keyring(keys))

    await executor.start(access(certs / "ours"))
    credentials = Credentials.of(str(files.cert), str(files.key), str(files.ca), str(own))
    router = Router([executor.address], link=functools.partial(Link, credentials=credentials))
    router.start()
    try:
        await eventually(lambda: router.ready("e") == 1, 60)
        await executor.stop()
        await executor.start(access(certs / "theirs"))
        await eventually(lambda: "has not signed" in caplog.text, 60)
        assert router.ready("e") == 0
        install(certs / "theirs", tmp_path)
        await eventually(lambda: router.ready("e") == 1, 60)
        await executor.stop()
        keys.write_text("{}")
        await executor.start(access(certs / "theirs"))
        await eventually(lambda: "not known, or was revoked" in caplog.text, 60)
        keys.unlink()
        own.write_text(key_file.add(keys, "gateway").secret)
        await eventually(lambda: router.ready("e") == 1, 60)
    finally:
        await router.stop()
        await executor.stop()


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (
            lambda certs: ServerTls(TlsFiles(certs / "no.pem", certs / "no")),
            InvalidArgument,
            "cannot read .*/no.pem: No such file",
        ),
        (
            lambda certs: ServerTls(TlsFiles(certs / "ours/gateway.pem", certs / "ours/client-key.pem")),
            FailedPrecondition,
            "the key in .*/client-key.pem is not that of the certificate in .*/gateway.pem",
        ),
        (
            lambda certs: ServerTls(TlsFiles(certs / "ours/gateway-key.pem", certs / "ours/gateway.pem")),
            FailedPrecondition,
            "holds no certificates in PEM",
        ),
        (
            lambda certs: ServerTls(pair(certs / "old", "gateway")),
            FailedPrecondition,
            "has been expired since .* UTC: renew it",
        ),
        (lambda certs: ServerTls(TlsFiles(ca=certs / "ours/ca.pem")), InvalidArgument, "needs its own, too"),
        (
            lambda certs: ServerTls(pair(certs / "ours", "gateway", certs / "none")),
            InvalidArgument,
            "cannot read .*/none/ca.pem",
        ),
        (
            lambda certs: ServerTls(
                TlsFiles(certs / "ours/gateway.pem", certs / "ours/gateway-key.pem", Path("system"))
            ),
            InvalidArgument,
            "would let in everybody with a public certificate",
        ),
        (lambda certs: ClientTls(pair(certs / "ours", "client")), InvalidArgument, "without --tls-ca"),
        (lambda certs: TlsFiles.of("a", None, None), InvalidArgument, "--tls-cert is given without --tls-key"),
        (
            lambda certs: Credentials.of("a", None, None, None, "--executor-tls"),
            InvalidArgument,
            "--executor-tls-cert is given without --executor-tls-key",
        ),
        (lambda certs: find(Given(api_key="two words")), InvalidArgument, "an API key of 9 characters is none"),
        (lambda certs: find(Given(api_key_file=f"{certs}/no")), InvalidArgument, "cannot read the API key in"),
        (lambda certs: Credentials.of(None, None, f"{certs}/no", None), InvalidArgument, "cannot read"),
    ],
)
def test_files_that_are_not_right_are_told(
    make: Callable[[Path], Any], kind: type[EnginehouseError], said: str, certs: Path
) -> None:
    with pytest.raises(kind, match=said):
        make(certs)


async def test_a_key_is_carried_with_and_without_tls_and_replaced_in_its_file(certs: Path, tmp_path: Path) -> None:
    keys, own = tmp_path / "keys.json", tmp_path / "own.key"
    first = key_file.add(keys, "acme")
    own.write_text(first.secret + "\n")
    keyring, key = Keyring(keys), key_of_file(own)
    tls = ServerTls(pair(certs / "ours", "gateway"))
    async with serving(Access(keyring=keyring)) as plain, serving(Access(tls, keyring=keyring)) as address:
        assert await called(plain, api_key=first.secret) == "acme"
        assert await called(address, api_key=first.secret, tls_ca=f"{certs}/ours/ca.pem") == "acme"
        with pytest.raises(Unauthenticated, match="no API key: send the metadata"):
            await called(plain)
        with typed(Given(api_key_file=str(own))):
            assert await called(plain) == "acme"
        async with Credentials(api_key=key).channel(plain) as channel:
            stub = GatewayStub(channel)
            assert await stub.ListModels(ListModelsRequest(), metadata=(("x-request-id", "mine"),))
            second = key_file.add(keys, "acme")
            key_file.revoke(keys, first.kept.id)
            keyring._file._looked -= 1
            with pytest.raises(grpc.aio.AioRpcError, match="not known, or was revoked"):
                await stub.ListModels(ListModelsRequest())
            own.write_text(second.secret)
            key.__self__._looked -= 1  # type: ignore[attr-defined]
            assert await stub.ListModels(ListModelsRequest())


async def test_the_environment_is_what_clients_bring_by_default(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_TLS_CA", f"{certs}/ours/ca.pem")
    monkeypatch.setenv("ENGINEHOUSE_API_KEY", "eh_of_the_environment")
    found = find(Given())
    assert found.tls and found.api_key and found.api_key() == "eh_of_the_environment"
    given = find(Given(api_key="eh_given"))
    assert given.api_key and given.api_key() == "eh_given"


def own(directory: Path) -> list[str]:
    return ["--tls-cert", f"{directory}/gateway.pem", "--tls-key", f"{directory}/gateway-key.pem"]


async def test_probes_speak_tls_and_need_no_key(
    certs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import asyncio

    key_file.add(tmp_path / "keys.json", "acme")
    access = Access(ServerTls(pair(certs / "ours", "gateway")), keyring=Keyring(tmp_path / "keys.json"))
    async with serving(access) as address:
        for arguments, status, said in (
            (["--tls-ca", f"{certs}/ours/ca.pem"], 0, "SERVING\n"),
            (["--tls-ca", f"{certs}/theirs/ca.pem"], 1, "has not signed"),
            ([], 1, "if it speaks TLS"),
            (own(certs / "ours"), 0, "SERVING\n"),  # as in the service's own container
            (own(certs / "elsewhere"), 1, "has not signed"),
            (["--tls-cert", "x"], 1, "--tls-cert is given without --tls-key"),
        ):
            assert await asyncio.to_thread(probe.main, [address, *arguments]) == status
            assert said in capsys.readouterr().out


async def test_a_probe_of_a_service_needs_no_more_than_the_service_has(
    certs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever hosts its certificate is for, and with mutual TLS too."""
    import asyncio

    ca = certs / "elsewhere/ca.pem"
    monkeypatch.setenv("ENGINEHOUSE_TLS_CERT", f"{certs}/elsewhere/gateway.pem")
    monkeypatch.setenv("ENGINEHOUSE_TLS_KEY", f"{certs}/elsewhere/gateway-key.pem")
    for asked in (None, ca.parent):
        async with serving(Access(ServerTls(pair(certs / "elsewhere", "gateway", asked)))) as address:
            assert await asyncio.to_thread(probe.main, [address]) == 0, capsys.readouterr().out


def test_what_tls_has_nothing_to_do_with_is_left_as_it_is() -> None:
    for details in ("Socket closed", "failed to connect to all addresses; last error: UNKNOWN: Connection refused", ""):
        assert why_not(details, "127.0.0.1:1", NONE) is None
