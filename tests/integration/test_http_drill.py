"""schemathesis finds no server error: requests of all forms, made of the OpenAPI document, to a cluster as `up` starts it."""

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.services import up

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"

pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo checkpoint is not there"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with up(f"demo={DEMO}", tmp_path_factory.mktemp("up")) as found:
        yield found


def bounded(url: str, path: Path) -> Path:
    """The server's document, less models that are not there and completions that take minutes."""
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        document: Any = json.load(answer)
    for name in ("CompletionRequest", "ChatRequest"):
        schema = document["components"]["schemas"][name]
        schema["properties"] |= {
            "model": {"const": "demo"},
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
        }
        schema["required"].append("max_tokens")
    path.write_text(json.dumps(document))
    return path


def test_no_server_error_and_no_answer_that_the_document_does_not_have(url: str, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
    program = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        str(bounded(url, tmp_path / "openapi.json")),
        "--url",
        url,
    ]
    options = ["--seed", "1", "--checks", checks, "--max-examples", "100", "--phases", "examples,coverage,fuzzing"]
    done = subprocess.run([*program, *options, "--no-color"], capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    told = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert told and told[1] == told[2] and int(told[1]) > 500, done.stdout[-2000:]
