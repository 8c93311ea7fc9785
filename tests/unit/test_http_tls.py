"""The HTTP port over TLS: who gets in, certificates that are replaced, and what it cannot do."""

import asyncio
import shutil
import ssl
from pathlib import Path

import httpx2
import pytest
from http_harness import http_cluster

from engine.errors import InvalidArgument, Unavailable
from enginehouse.certificates import generate
from gateway.http.endpoint import Surroundings
from gateway.http.listener import Listener
from protos.access import Access
from protos.tls import ServerTls, TlsFiles


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("certs")
    for name in ("first", "second"):
        generate(root / name, ["127.0.0.1"])
    return root


def trust(directory: Path, client: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    if client:
        context.load_cert_chain(directory / "client.pem", directory / "client-key.pem")
    return context


async def test_mutual_tls_with_certificates_that_are_replaced(certs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "certs"
    shutil.copytree(certs / "first", mine)
    tls = ServerTls(TlsFiles(mine / "gateway.pem", mine / "gateway-key.pem", mine / "ca.pem"))
    async with http_cluster(tmp_path / "store", access=Access(tls)) as http:

        async def gets_in(context: ssl.SSLContext) -> bool:
            async with httpx2.AsyncClient(verify=context) as client:
                try:
                    return (await client.get(f"{http.url}/health")).status_code == 200
                except httpx2.TransportError:  # TLS 1.3 tells a client of its certificate when it has begun to speak
                    return False

        assert http.url.startswith("https://")
        assert await gets_in(trust(certs / "first"))
        assert not await gets_in(trust(certs / "first", client=False))
        assert not await gets_in(trust(certs / "second"))
        for file in (certs / "second").iterdir():
            shutil.copy(file, mine)
        async with asyncio.timeout(60):
            while not await gets_in(trust(certs / "second")):  # noqa: ASYNC110  (files are looked at once a second)
                await asyncio.sleep(0.1)
        assert not await gets_in(trust(certs / "first"))


async def test_what_cannot_be_had() -> None:
    def listener(access: Access, port: int = 0) -> Listener:
        async def app(*_: object) -> None:
            raise AssertionError("nobody asks")

        return Listener(app, Surroundings(access, 1), "127.0.0.1", port, 1)

    with pytest.raises(InvalidArgument, match="--allow-client exclude each other"):
        listener(Access(names=frozenset({"me"})))
    first = listener(Access())
    with pytest.raises(Unavailable, match="it is taken; choose another port with --http-port"):
        listener(Access(), int(first.url.rpartition(":")[2]))
    await first.stop()
