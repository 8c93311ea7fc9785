"""A real cluster: `up --json`, and the examples of `bench` and `generate` as their help shows them."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from enginehouse.cli import main
from enginehouse.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo-model"
ENGINEHOUSE = [sys.executable, "-m", "enginehouse"]

pytestmark = pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo checkpoint is not there")


class Cluster:
    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ENGINEHOUSE_")}
        self.folder = folder
        self.environment = kept | {"ENGINEHOUSE_HOME": str(folder / "home")}
        self.process = subprocess.Popen(
            [*ENGINEHOUSE, "up", f"demo={DEMO}", "--port", "0", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )
        assert self.process.stdout
        self.told = json.loads(self.process.stdout.readline())

    def run(self, *arguments: str, input: str = "") -> Result:
        """In this process: the cluster is in others, and that is what is real here."""
        with contextlib.chdir(self.folder):
            return CliRunner().invoke(
                main, arguments, input=input, env={"ENGINEHOUSE_HOME": self.environment["ENGINEHOUSE_HOME"]}
            )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("bench"))
    yield started
    started.process.send_signal(signal.SIGINT)
    rest, _ = started.process.communicate(timeout=60)
    assert (started.process.returncode, rest) == (0, b"")  # one line of JSON was all


def point(done: Result) -> Any:
    assert done.exit_code == 0, done.stderr
    (only,) = json.loads(done.stdout)["points"]
    return only


def test_up_says_where_it_is(cluster: Cluster) -> None:
    told = cluster.told
    assert told["pid"] == cluster.process.pid and len(told["executors"]) == 1
    assert told["data"] == str(cluster.folder / "home")
    served = json.loads(cluster.run("models", "--gateway", told["gateway"], "--json").stdout)
    assert [(model["name"], model["engine_id"]) for model in served] == [
        (model["name"], model["engine_id"]) for model in told["models"]
    ]
    planned = json.loads(cluster.run("plan", "demo", "--gpu", "H100", "--json").stdout)
    assert planned["model"]["kv_bytes_per_token"] == 5 * 2 * 2 * 32 * 4
    loaded = json.loads(cluster.run("load", "demo", "--json").stdout)
    assert (loaded["engine_id"], loaded["executors"]) == (told["models"][0]["engine_id"], told["executors"])


def examples(command: str) -> list[str]:
    return [line for line in EXAMPLES[command] if line.startswith("enginehouse ")]


@pytest.mark.parametrize("line", [*examples("bench"), *examples("generate")])
def test_the_examples_run(line: str, cluster: Cluster) -> None:
    words = shlex.split(line, comments=True)[1:]
    if "<" in words:
        words = words[: words.index("<")]
    done = cluster.run(*words, input="And it came to pass")
    assert done.exit_code == 0, done.stderr
    if "--json" in words:
        assert json.loads(done.stdout)
    for option in ("--out", "--plot"):
        if option in words:
            assert (cluster.folder / words[words.index(option) + 1]).stat().st_size > 1000
    assert "failed" not in done.stderr


def test_every_prompt_is_computed_unless_a_prefix_is_shared(cluster: Cluster) -> None:
    common = ("bench", "--requests", "6", "--concurrency", "2", "--input-len", "96", "--output-len", "4", "--json")
    apart = point(cluster.run(*common))
    assert (apart["completed"], apart["output_tokens"], apart["prompt_tokens"]) == (6, 24, 6 * 96)
    assert apart["cached_tokens"] == 0
    shared = point(cluster.run(*common, "--shared-prefix", "80"))
    assert shared["cached_tokens"] == 6 * 80  # the warm-up has computed it
    seeded = (*common, "--seed", "11")
    point(cluster.run(*seeded))
    again = cluster.run(*seeded)
    assert point(again)["cached_tokens"] > 0 and "were in the prefix cache" in again.stderr


def test_a_request_that_the_gateway_refuses_is_a_failure(cluster: Cluster) -> None:
    (cluster.folder / "long.jsonl").write_text(json.dumps([5] * 3000) + "\n")
    done = cluster.run("bench", "--prompts", "long.jsonl", "--requests", "2", "--warmup", "0", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["points"][0]["failures"][0]["reason"] == "CONTEXT_TOO_LONG"
