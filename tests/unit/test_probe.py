"""The probe of health against a real server; the services' own answers are in tests/integration/test_compose.py."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from protos.probe import main


@pytest.fixture
def server() -> Iterator[tuple[str, health.HealthServicer]]:
    checks = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", checks
    server.stop(0).wait()


def test_status_is_0_while_the_service_serves_and_1_when_it_says_that_it_does_not(
    server: tuple[str, health.HealthServicer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, checks = server
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # for the outside
    checks.set("enginehouse.v1.Gateway", HealthCheckResponse.SERVING)
    assert main([address, "--service", "enginehouse.v1.Gateway"]) == 0
    checks.set("enginehouse.v1.Gateway", HealthCheckResponse.NOT_SERVING)
    assert main([address, "--service", "enginehouse.v1.Gateway"]) == 1
    assert main([address, "--service", "enginehouse.v1.Builder"]) == 1
    assert main([address]) == 0
    states = capsys.readouterr().out.split("\n")
    assert [state.partition(":")[0] for state in states] == ["SERVING", "NOT_SERVING", "NOT_FOUND", "SERVING", ""]


def test_status_is_1_where_nobody_listens_or_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as deaf, socket.socket() as silent:
        for each in (deaf, silent):
            each.bind(("127.0.0.1", 0))
        silent.listen()
        assert main([f"127.0.0.1:{deaf.getsockname()[1]}"]) == 1
        assert capsys.readouterr().out.startswith("UNAVAILABLE: ")
        began = time.monotonic()
        assert main([f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.3"]) == 1
        assert time.monotonic() - began < 30
        assert capsys.readouterr().out.startswith("DEADLINE_EXCEEDED: ")


def test_what_is_no_address_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["8400"])
    assert ended.value.code == 2
    assert "'8400' is not HOST:PORT, such as 127.0.0.1:8400" in capsys.readouterr().err
