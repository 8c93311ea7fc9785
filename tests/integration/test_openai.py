"""OpenAI's official client against a cluster as `enginehouse up` starts it, with the bundled checkpoint."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.integration.services import service, up

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo-model"
PAGE = (ROOT / "docs" / "openai.md").read_text()

pytestmark = pytest.mark.skipif(not (DEMO / "model.safetensors").exists(), reason="the demo checkpoint is not there")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a cluster that serves the demo model."""
    root = tmp_path_factory.mktemp("up")
    with up(f"demo={DEMO}", root) as found:
        yield found
        assert f"page       {found}/" in (root / "up.log").read_text()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_streamed_or_not_and_in_either_form_the_text_is_the_same(client: openai.OpenAI) -> None:
    """The demo model's template writes the messages' text alone."""
    options: Any = {"model": "demo", "temperature": 0, "max_tokens": 24, "seed": 1}
    whole = client.completions.create(prompt="In the beginning", **options)
    streamed = client.completions.create(prompt="In the beginning", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text != ""
    assert whole.usage is not None and whole.usage.completion_tokens == 24

    messages: Any = [{"role": "user", "content": "In the beginning"}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=1, **options)
    assert chat.choices[0].message.content == whole.choices[0].text
    with client.chat.completions.stream(messages=messages, **options) as events:
        events.until_done()
        final = events.current_completion_snapshot
    assert final.choices[0].message.content == whole.choices[0].text
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    rows = chat.choices[0].logprobs.content
    assert "".join(row.token for row in rows) == whole.choices[0].text
    assert all(row.token == row.top_logprobs[0].token for row in rows)  # greedy takes the best


def test_the_same_seed_gives_the_same_text_and_several_differ(client: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "prompt": "And", "max_tokens": 16, "seed": 7, "n": 3}
    once, again = ([choice.text for choice in client.completions.create(**options).choices] for _ in range(2))
    assert once == again and len(set(once)) == 3


def test_structured_output(client: openai.OpenAI) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"good": {"type": "boolean"}, "day": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["good", "day"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "day", "schema": schema, "strict": True}}
    made = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "And"}], response_format=form, max_tokens=60, seed=3
    )
    assert made.choices[0].finish_reason == "stop" and made.choices[0].message.content
    jsonschema.validate(json.loads(made.choices[0].message.content), schema)


def test_status_tells_of_executors_and_builds(client: openai.OpenAI, url: str) -> None:
    client.completions.create(model="demo", prompt="And", max_tokens=4, extra_body={"ignore_eos": True})
    status = client._client.get(f"{url}/status").json()
    ((engine,),) = [executor["engines"] for executor in status["executors"]]
    assert engine["models"] == ["demo"] and engine["free_kv_blocks"] <= engine["total_kv_blocks"]
    assert [(build["model"], build["state"]) for build in status["builds"]] == [("demo", "succeeded")]
    assert status["completion_tokens"] >= 4 and status["first_token_seconds"]["count"] >= 1
    assert status["first_token_seconds"]["p50"] <= status["first_token_seconds"]["p95"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def here(code: str, url: str) -> str:
    """With the address of this test's cluster instead of the page's."""
    assert "http://127.0.0.1:8480" in code or "page" in code
    return code.replace("http://127.0.0.1:8480", url)


@pytest.mark.parametrize("number", range(len(blocks("bash"))))
def test_the_pages_commands(url: str, number: int) -> None:
    code = blocks("bash")[number]
    if code.startswith("enginehouse up"):
        assert shlex.split(code) == ["enginehouse", "up", "demo=examples/demo-model"]  # as the fixture, less the port
        return
    done = subprocess.run(["bash", "-ec", here(code, url)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and '"error"' not in done.stdout and done.stdout, done


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_pages_programs(url: str, number: int) -> None:
    code = here(blocks("python")[number], url)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0 and done.stdout, done


def test_a_gateway_that_has_its_own_extra_alone(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    options = ("--store", store, "--executor", "127.0.0.1:1", "--http-port", "0")
    with service("gateway", tmp_path / "log", *options) as gateway:
        with openai.OpenAI(base_url=f"{gateway.http}/v1", api_key="none", max_retries=0) as client:
            assert list(client.models.list()) == []
            assert client._client.get(f"{gateway.http}/").text.startswith("<!doctype html>")
            with pytest.raises(openai.NotFoundError, match="demo"):
                client.completions.create(model="demo", prompt="x", extra_headers={"x-request-id": "mine-7"})
        assert gateway.stop() == 0
    assert 'request_id=mine-7 method="POST /v1/completions" code=NOT_FOUND' in gateway.log.read_text()
