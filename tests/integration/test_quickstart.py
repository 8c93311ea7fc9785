"""docs/quickstart.md as somebody follows it, and `LLM.connect` beyond it, over one cluster."""

import asyncio
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from enginehouse import LLM, SamplingParams
from enginehouse.process import service_environment
from tests.documents import commands

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "quickstart.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = commands("quickstart.md")
GATEWAY = "127.0.0.1:8400"
PROMPT = "In the beginning God created the"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quickstart")
    (directory / "examples").symlink_to(ROOT / "examples")
    return directory


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    return {**service_environment(), "ENGINEHOUSE_HOME": str(folder / "home")}


@pytest.fixture(scope="module")
def cluster(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The page's own command, on a free port; the gateway's address."""
    (up,) = (command for command in COMMANDS if command.startswith("enginehouse up"))
    command = [sys.executable, "-m", *shlex.split(up), "--port", "0", "--json"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    yield json.loads(process.stdout.readline())["gateway"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (0, 130)


def test_all_of_its_python_in_one_program(folder: Path, environment: dict[str, str], cluster: str) -> None:
    assert len(PYTHON) > 6 and sum(GATEWAY in block for block in PYTHON) == 1
    program = "".join(PYTHON).replace(GATEWAY, cluster)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(" heavens, in the clouds")
    assert lines[-1] == lines[-3] == lines[-4] and lines[-1].startswith(" of the first day")
    assert len(json.loads(lines[-2])) == 8
    assert sorted(path.name for path in folder.iterdir()) == [
        "demo.engine",
        "examples",
        "home",
        "small.engine",
        "store",
    ]


def test_its_command_that_generates(folder: Path, environment: dict[str, str], cluster: str) -> None:
    (generate,) = (command for command in COMMANDS if command.startswith("enginehouse generate"))
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(generate), "--gateway", cluster, "--max-tokens", "4", "--temperature", "0"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "of the first day" in done.stdout
    assert [command for command in COMMANDS if command.split()[0] not in ("pip", "enginehouse")] == []


# LLM.connect


@pytest.fixture(scope="module")
def llm(cluster: str) -> Iterator[LLM]:
    with LLM.connect(cluster, "demo") as connected:
        yield connected


def test_the_same_class_over_the_cluster(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, logprobs=1)
    one = llm.generate(PROMPT, params)
    assert one.finished and one.outputs[0].text == " heavens, in the clouds"
    assert one.outputs[0].logprobs is not None and len(one.outputs[0].logprobs) == 6
    ids = llm.tokenizer.encode(PROMPT)
    by_ids, other = llm.generate([ids, "And it came to pass"], params)
    assert by_ids.outputs == one.outputs and by_ids.prompt_token_ids == ids
    assert other.outputs != one.outputs
    assert llm.tokenizer.decode(one.outputs[0].token_ids).strip() == one.outputs[0].text.strip()
    beams = llm.generate(PROMPT, SamplingParams(beam_width=2, max_tokens=4)).outputs
    assert len(beams) == 2 and llm.engine is None
    chat = llm.generate([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2))
    assert chat.outputs[0].length == 2
    diffs = [output.outputs[0].text_diff for output in llm.generate_async(PROMPT, params, streaming=True)]
    assert "".join(diffs) == one.outputs[0].text


async def test_in_an_event_loop_and_cancelled(llm: LLM) -> None:
    outputs = await asyncio.gather(*(llm.generate_async(PROMPT, SamplingParams(max_tokens=4)) for _ in range(8)))
    assert {output.outputs[0].text for output in outputs} == {" heavens, in the"}
    result = llm.generate_async(PROMPT, SamplingParams(max_tokens=2000, ignore_eos=True), streaming=True)
    async for _ in result:
        break
    result.cancel()
    output = await result
    assert output.outputs[0].finish_reason == "cancelled" and output.outputs[0].length < 2000


def test_errors_are_the_gateways_own_words(llm: LLM, cluster: str) -> None:
    with pytest.raises(InvalidArgument, match="temperature is -1"):  # before anything is sent
        llm.generate_async(PROMPT, SamplingParams(temperature=-1))
    with pytest.raises(ValueError, match="max_tokens .9999. are more than the 2048"):
        llm.generate([PROMPT, PROMPT], SamplingParams(max_tokens=9999))
    with pytest.raises(FailedPrecondition, match="the cluster's"):
        llm.save("anywhere")
    with pytest.raises(FailedPrecondition, match="by its metrics"):
        llm.get_stats()
    with pytest.raises(NotFound, match="has no model 'nope'; there are: demo"):
        LLM.connect(cluster, "nope")
    began = time.monotonic()
    with pytest.raises(Unavailable, match="no gateway answers at 127.0.0.1:1"):
        LLM.connect("127.0.0.1:1", "demo")
    assert time.monotonic() - began < 30


def test_without_text_and_after_the_end(cluster: str) -> None:
    with LLM.connect(cluster, "demo", skip_tokenizer_init=True) as bare:
        output = bare.generate([0, 1082, 261], SamplingParams(max_tokens=3)).outputs[0]
        assert (output.text, output.length, bare.tokenizer) == ("", 3, None)
        with pytest.raises(FailedPrecondition, match="no tokenizer, as it was asked for"):
            bare.generate(PROMPT)
        pending = bare.generate_async([0], SamplingParams(max_tokens=2000, ignore_eos=True))
    with pytest.raises(Unavailable, match="was shut down"):
        bare.generate([0])
    assert pending.result(60).outputs[0].finish_reason == "cancelled"
