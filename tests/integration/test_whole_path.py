"""A checkpoint to streamed tokens through the three real services, driven by stubs generated from protos/ alone."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers

from tests.integration.services import Service, service

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stubs of a copy of the .proto files, in a folder with nothing else."""
    directory = tmp_path_factory.mktemp("stubs")
    protos = directory / "protos" / "v1"
    protos.mkdir(parents=True)
    for file in (ROOT / "protos" / "v1").glob("*.proto"):
        shutil.copy(file, protos)
    files = [f"protos/v1/{file.name}" for file in protos.glob("*.proto")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "--python_out=.", "--grpc_python_out=.", *files]
    subprocess.run(command, cwd=directory, check=True)
    for package in (directory / "protos", protos):
        (package / "__init__.py").touch()
    return directory


def test_from_checkpoint_to_streamed_tokens(checkpoint: Path, stubs: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with ExitStack() as stack:

        def start(package: str, *arguments: str) -> Service:
            return stack.enter_context(service(package, tmp_path / f"{package}.log", "--store", store, *arguments))

        builder = start("builder_svc", "--checkpoint-root", str(checkpoint.parent))
        executors = [start("executor_svc") for _ in range(2)]
        gateway = start("gateway", *(part for executor in executors for part in ("--executor", executor.address)))
        addresses = [builder.address, ",".join(executor.address for executor in executors), gateway.address]
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/integration/stub_client.py"), *addresses, checkpoint.name],
            env={**os.environ, "PYTHONPATH": str(stubs), "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        for running in (gateway, *executors, builder):
            assert running.stop() == 0
    found = json.loads(done.stdout)

    assert found["sequences"] == list(range(len(found["sequences"])))
    assert found["phases"] == ["checkpoint", "program", "weights", "upload", "publish"]
    assert found["build"] == "BUILD_STATE_SUCCEEDED"
    assert found["loaded"] == [True, True]
    assert found["model"] == ["tiny", True, 2]

    reference = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = found["prompt_ids"]
    wanted = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()[len(prompt) :]
    assert found["from_text"]["ids"] == found["from_ids"]["ids"] == found["executor_ids"] == wanted
    assert found["run"] == [wanted] * 3 and found["run_ends"] == [0, 1, 2]
    assert found["from_text"]["text"] == found["from_ids"]["text"] == found["detokenized"]
    assert found["from_text"]["finishes"] == ["FINISH_REASON_LENGTH"]
    assert found["from_text"]["usage"] == [len(prompt), 0, 24]

    errors = found["errors"]
    assert errors["unknown model"][0] == "NOT_FOUND" and "tiny" in errors["unknown model"][1]
    assert errors["no prompt"][0] == "INVALID_ARGUMENT"
    assert errors["unknown build"][0] == "NOT_FOUND"
    assert errors["unknown engine"][0] == "NOT_FOUND"
    assert errors["not loaded"][0] == "FAILED_PRECONDITION" and "LoadEngine" in errors["not loaded"][1]
