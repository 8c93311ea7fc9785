"""The real thing, as a person uses it: `enginehouse up demo=examples/demo-model -- enginehouse generate ...`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
ENGINEHOUSE = [sys.executable, "-m", "enginehouse"]
GREEDY = ["--temperature", "0"]  # a sampled text may end at any token

pytestmark = pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo checkpoint is not there")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("home")


def environment(data: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENGINEHOUSE_")}
    return kept | {"ENGINEHOUSE_HOME": str(data)}


def enginehouse(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ENGINEHOUSE, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(data),
        stdin=subprocess.DEVNULL,
    )


def nothing_left(data: Path) -> None:
    """No process has the data folder on its command line or among its open files' names any more."""
    deadline = time.monotonic() + 60
    while True:
        left = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(data).encode() in path.read_bytes():
                    left.append(path.read_bytes())
            except OSError:
                continue
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_demo_twice(data: Path) -> None:
    """Builds, serves, streams; the second run finds the engine and says the same."""
    ask = [*ENGINEHOUSE, "generate", "In the beginning", "--max-tokens", "24", *GREEDY]
    first = enginehouse(data, "up", f"demo={DEMO}", "--port", "0", "--", *ask, "--stats")
    assert first.returncode == 0, first.stderr
    assert len(first.stdout) > 20
    for said in (
        "demo: weights",
        "built in",
        "demo: loaded by 1 executor",
        "24 tokens in",
        "tokens/s",
        "finish: length",
    ):
        assert said in first.stderr
    assert "enginehouse up demo" in first.stderr
    nothing_left(data)

    second = enginehouse(data, "up", f"demo={DEMO}", "--port", "0", "--", *ask, "--json")
    assert second.returncode == 0, second.stderr
    assert "is in the store already" in second.stderr
    told = json.loads(second.stdout)
    assert told["text"].strip() == first.stdout.strip()
    assert told["usage"]["completion_tokens"] == len(told["token_ids"]) == 24
    nothing_left(data)


def test_the_store_and_a_build_in_this_process(data: Path) -> None:
    """`build` without a builder gives the engine that the builder gave."""
    listed = json.loads(enginehouse(data, "models", "--store", str(data / "store"), "--json").stdout)
    built = enginehouse(data, "build", str(DEMO), "--name", "again", "--json")
    assert built.returncode == 0, built.stderr
    told = json.loads(built.stdout)
    assert (told["engine_id"], told["reused"]) == (listed[0]["engine_id"], True)
    assert told["size"] == listed[0]["size"] > 1_000_000


def test_a_running_cluster(data: Path) -> None:
    """Ctrl-C in an answer cancels it, and the executor goes on. A name that is built anew goes on with its old engine until
    the new one is loaded. Ctrl-C ends all of the cluster, with status 0."""
    up = subprocess.Popen(
        [*ENGINEHOUSE, "up", "demo", "--port", "0", "--executors", "2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(data),
    )
    try:
        assert up.stderr
        said = b""
        while b"Ctrl-C stops" not in said:
            line = up.stderr.readline()
            assert line, said
            said += line
        served = json.loads(enginehouse(data, "models", "--json").stdout)
        assert [(model["name"], model["ready_executors"]) for model in served] == [("again", 2), ("demo", 2)]

        generate = subprocess.Popen(
            [
                *ENGINEHOUSE,
                "generate",
                "And God said",
                "--model",
                "demo",
                "--max-tokens",
                "2000",
                *GREEDY,
                "--ignore-eos",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(data),
        )
        assert generate.stdout
        generate.stdout.read(1)
        generate.send_signal(signal.SIGINT)
        _, error = generate.communicate(timeout=60)
        assert (generate.returncode, error) == (130, b"")

        after = enginehouse(data, "generate", "And it came", "--model", "demo", "--max-tokens", "8", "--json")
        assert after.returncode == 0, after.stderr
        refused = enginehouse(data, "up", "--port", "0")
        assert refused.returncode == 1
        assert f"(process {up.pid}" in refused.stderr

        assert enginehouse(data, "build", str(DEMO), "--name", "demo", "--max-batch-size", "8").returncode == 0
        new = json.loads(enginehouse(data, "models", "--store", str(data / "store"), "--json").stdout)[1]["engine_id"]
        between = enginehouse(data, "generate", "And it came", "--model", "demo", "--max-tokens", "8")
        assert between.returncode == 0, between.stderr
        loaded = enginehouse(data, "load", "demo")
        assert loaded.returncode == 0 and "demo: loaded by 2 executors" in loaded.stderr
        deadline = time.monotonic() + 60
        while json.loads(enginehouse(data, "models", "--json").stdout)[1]["engine_id"] != new:
            assert time.monotonic() < deadline
        moved = enginehouse(data, "generate", "And it came", "--model", "demo", "--max-tokens", "8")
        assert moved.returncode == 0, moved.stderr

        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
        nothing_left(data)
    finally:
        up.kill()
        up.communicate()
