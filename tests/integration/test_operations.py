"""docs/operations.md as somebody follows it, over one cluster: every command, in order."""

import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from enginehouse.process import service_environment
from tests.documents import commands
from tests.integration.services import Service, service

pytestmark = pytest.mark.drill

ROOT = Path(__file__).parents[2]
COMMANDS = commands("operations.md")


def test_every_command(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    store = open_store(str(tmp_path / "srv" / "engines"))
    first = build(ROOT / "examples" / "demo-model", store=store).manifest.engine_id
    registry.set_name(store, "demo", first)
    environment = {**service_environment(), "OLD": first[:12], "ENGINEHOUSE_HOME": str(tmp_path / "home")}
    with ExitStack() as stack:

        def start(package: str, *arguments: str) -> Service:
            options = ("--store", store.url, "--metrics-port", "0", *arguments)
            return stack.enter_context(service(package, tmp_path / f"{package}.log", *options))

        builder = start("builder_svc", "--checkpoint-root", str(ROOT))
        executor = start("executor_svc", "--engine", "demo")
        gateway = start("gateway", "--executor", executor.address)
        places = {
            "/srv/": f"{tmp_path}/srv/",
            "127.0.0.1:8400": gateway.address,
            "127.0.0.1:8401": builder.address,
            "127.0.0.1:8411": executor.address,
            "http://127.0.0.1:9400/metrics": gateway.metrics,
            "http://127.0.0.1:9411/metrics": executor.metrics,
            "build examples/": f"build {ROOT}/examples/",
        }
        assert len(COMMANDS) > 18
        for line in COMMANDS:
            command = line
            for there, here in places.items():
                command = command.replace(there, here)
            if command.startswith("python -m executor_svc"):
                starts_and_ends(shlex.split(command)[1:], environment, tmp_path)
                continue
            command = command.replace("enginehouse ", f"{sys.executable} -m enginehouse ", 1)
            command = command.replace("python -m protos", f"{sys.executable} -m protos")
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
        said = subprocess.run(
            [sys.executable, "-m", "enginehouse", "models", "history", "demo", "--store", store.url],
            env=environment, capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        assert said.count(first[:12]) == 2  # it was given the name, and then again


def starts_and_ends(arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    with (folder / "started.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--port", "0"],
            env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    assert " listening on " in process.stdout.readline(), (folder / "started.log").read_text()
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
