"""A config without weights goes to a builder, an executor makes the weights, and a benchmark measures what they generate."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from enginehouse.cli import main
from tests.integration.services import Service, service


def typed(*words: str) -> Any:
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_from_a_config_to_a_benchmark(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    for folder in ("alone", "root"):
        (tmp_path / folder).mkdir()
    shutil.copy(checkpoint / "config.json", tmp_path / "alone")
    with ExitStack() as stack:

        def start(package: str, *arguments: str) -> Service:
            store = ("--store", str(tmp_path / "store"))
            return stack.enter_context(service(package, tmp_path / f"{package}.log", *store, *arguments))

        builder = start("builder_svc", "--checkpoint-root", str(tmp_path / "root"))
        executor = start("executor_svc")
        gateway = start("gateway", "--executor", executor.address)
        there = ("--builder", builder.address, "--upload", "--name", "m")
        built = typed("build", str(tmp_path / "alone"), "--dummy-weights", *there)
        assert built["dummy_weights"] and not built["reused"]
        typed("load", "m", "--executor", executor.address)
        at = ("--model", "m", "--gateway", gateway.address)
        first, second = (typed("generate", "5 9", "--token-ids", "--temperature", "0", *at) for _ in range(2))
        assert (first["token_ids"], first["text"]) == (second["token_ids"], "") and len(set(first["token_ids"])) > 5
        settings = ("--requests", "4", "--concurrency", "2", "--input-len", "8", "--output-len", "4", "--warmup", "0")
        (point,) = typed("bench", *settings, *at)["points"]
        assert (point["requests"], point["output_tokens"]) == (4, 16), point
        refused = CliRunner().invoke(main, ["generate", "some text", *at])
        assert refused.exit_code == 1 and "has no tokenizer: send the prompt as token ids" in refused.stderr
