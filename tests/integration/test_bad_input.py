"""Bad input to the real services, and what a client that has only stubs gets: a status, a reason, the value and the fix."""

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from safetensors.torch import load_file, save_file

from engine.blobs import blob_key
from engine.opset import OPSET_VERSION
from enginehouse.cli import main
from protos.v1.builder_pb2 import BUILD_STATE_FAILED, Build, BuildSpec, SubmitBuildRequest, WatchBuildRequest
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria, TokenIds
from protos.v1.executor_pb2 import (
    ENGINE_STATE_READY,
    Command,
    GetStatusRequest,
    LoadEngineRequest,
    StepOutput,
    Submit,
)
from protos.v1.gateway_pb2 import (
    Chat,
    ChatMessage,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from tests.conftest import VOCAB_SIZE
from tests.integration.bad_cluster import MAX_BATCH_SIZE, MAX_SEQ_LEN, MAX_WAITING, Cluster, failed, serves, services
from tests.integration.services import standing

MOST = 2**32 - 1
nan, inf = float("nan"), float("inf")


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with services(checkpoint, tmp_path_factory.mktemp("bad")) as started:
        yield started


def ids(*token_ids: int) -> TokenIds:
    return TokenIds(ids=token_ids)


def chat(*messages: tuple[str, str]) -> Chat:
    return Chat(messages=[ChatMessage(role=role, content=content) for role, content in messages])


def sampling(**fields: float) -> dict[str, Any]:
    return {"sampling": SamplingParams(**fields)}  # type: ignore[arg-type]


def stopping(**fields: Any) -> dict[str, Any]:
    return {"stopping": StoppingCriteria(**fields)}


# Requests. For each: the fields, the reason, and what the message says: the value, the fix.
VALUES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "negative temperature": (sampling(temperature=-0.5), "TEMPERATURE_INVALID", "is -0.5", "at least 0"),
    "temperature nan": (sampling(temperature=nan), "TEMPERATURE_INVALID", "is nan", "give a finite number"),
    "temperature inf": (sampling(temperature=inf), "TEMPERATURE_INVALID", "is inf", "give a finite number"),
    "top_p 0": (sampling(top_p=0.0), "TOP_P_INVALID", "is 0", "above 0 and at most 1"),
    "top_p 1.5": (sampling(top_p=1.5), "TOP_P_INVALID", "is 1.5", "above 0 and at most 1"),
    "top_p nan": (sampling(top_p=nan), "TOP_P_INVALID", "is nan", "above 0 and at most 1"),
    "top_p inf": (sampling(top_p=inf), "TOP_P_INVALID", "is inf", "above 0 and at most 1"),
    "top_p negative": (sampling(top_p=-0.1), "TOP_P_INVALID", "is -0.1", "above 0 and at most 1"),
    "max_tokens 0": (stopping(max_tokens=0), "MAX_TOKENS_INVALID", "max_tokens is 0", "give at least 1"),
    "max_tokens huge": (stopping(max_tokens=MOST), "CONTEXT_TOO_LONG", str(MOST), f"at most {MAX_SEQ_LEN - 1}"),
    "max_tokens one too many": (stopping(max_tokens=256), "CONTEXT_TOO_LONG", "256", f"at most {MAX_SEQ_LEN - 1}"),
    "stop id outside": (stopping(stop_token_ids=[VOCAB_SIZE]), "TOKEN_ID_INVALID", "320", "ids from 0 to 319"),
}
PROMPTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "none": ({}, "PROMPT_MISSING", "no prompt", "set one of text, token_ids and chat"),
    "text and ids": ({"text": "x", "token_ids": ids(5)}, "PROMPT_AMBIGUOUS", "text and token_ids", "set only one of"),
    "ids and chat": (
        {"token_ids": ids(5), "chat": chat(("user", "x"))},
        "PROMPT_AMBIGUOUS",
        "token_ids and chat",
        "set only one of",
    ),
    "empty text": ({"text": ""}, "PROMPT_EMPTY", "empty", "give some text"),
    "empty ids": ({"token_ids": ids()}, "PROMPT_EMPTY", "empty", "give some token_ids"),
    "empty chat": ({"chat": chat()}, "PROMPT_EMPTY", "empty", "give some chat"),
    "no tokens": ({"text": "   "}, "PROMPT_EMPTY", "'   '", "Give other text"),
    "no role": ({"chat": chat(("", "x"))}, "CHAT_INVALID", "no role", "give each one"),
    "id outside": ({"token_ids": ids(5, VOCAB_SIZE)}, "TOKEN_ID_INVALID", "holds 320", "ids from 0 to 319"),
    "id far outside": ({"token_ids": ids(MOST)}, "TOKEN_ID_INVALID", str(MOST), "ids from 0 to 319"),
    "too long": ({"token_ids": ids(*[5] * 256)}, "CONTEXT_TOO_LONG", "256 tokens", "shorten it to at most 255"),
    "stop string": ({"text": "x", "stop": [""]}, "STOP_INVALID", "0 characters", "give 1 to 1000"),
}


@pytest.mark.parametrize("case", [*VALUES, *PROMPTS])
def test_a_request_through_the_gateway(cluster: Cluster, case: str) -> None:
    fields, reason, value, fix = PROMPTS[case] if case in PROMPTS else VALUES[case]
    if case in VALUES:
        fields = {"token_ids": ids(5), **fields}
    found = failed(cluster.gateway.Generate(GenerateRequest(model="tiny", **fields), timeout=60))
    assert (found.code, found.reason) == ("INVALID_ARGUMENT", reason)
    assert value in found.message and fix in found.message, found.message


DIRECT: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    **{case: (fields, "INVALID_ARGUMENT", *rest) for case, (fields, *rest) in VALUES.items()},  # type: ignore[misc]
    "empty": ({"token_ids": []}, "INVALID_ARGUMENT", "PROMPT_EMPTY", "empty", "give at least one token id"),
    "id outside": ({"token_ids": [VOCAB_SIZE]}, "INVALID_ARGUMENT", "TOKEN_ID_INVALID", "320", "ids from 0 to 319"),
    "resumed id outside": (
        {"resume_token_ids": [VOCAB_SIZE]},
        "INVALID_ARGUMENT",
        "TOKEN_ID_INVALID",
        "320",
        "from 0 to 319",
    ),
    "too long": ({"token_ids": [5] * 256}, "INVALID_ARGUMENT", "CONTEXT_TOO_LONG", "256 prompt tokens", "most 255"),
    "resumed to the end": (
        {"resume_token_ids": [5] * 4},
        "INVALID_ARGUMENT",
        "MAX_TOKENS_INVALID",
        "4 resume_token_ids",
        "raise it",
    ),
    "no time": ({"timeout": {"nanos": 0}}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "0 s", "give it more time"),
    "time gone": ({"timeout": {"seconds": -3}}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "-3 s", "give it more time"),
    "not loaded": (
        {"engine_id": "0" * 64},
        "FAILED_PRECONDITION",
        "ENGINE_NOT_LOADED",
        "000000000000",
        "call LoadEngine",
    ),
    "no engine": ({"engine_id": ""}, "FAILED_PRECONDITION", "ENGINE_NOT_LOADED", "(none given)", "call LoadEngine"),
}


@pytest.mark.parametrize("case", DIRECT)
def test_a_request_to_the_executor(cluster: Cluster, case: str) -> None:
    """Alone, and among good ones on a Run stream, where it fails alone."""
    fields, code, reason, value, fix = DIRECT[case]
    found = failed(cluster.executor.Generate(cluster.submit(**fields), timeout=60))
    assert (found.code, found.reason) == (code, reason)
    assert value in found.message and fix in found.message, found.message

    submits = [cluster.submit(), cluster.submit(**fields), cluster.submit()]
    outputs = run(cluster, submits)
    failures = {item.handle: item.failure for output in outputs for item in output.failed}
    assert {item.handle for output in outputs for item in output.finished} == {submits[0].handle, submits[2].handle}
    assert list(failures) == [submits[1].handle]
    assert (failures[submits[1].handle].reason, failures[submits[1].handle].message) == (reason, found.message)


def run(cluster: Cluster, submits: list[Submit]) -> list[StepOutput]:
    return list(cluster.executor.Run(iter([Command(submit=submit) for submit in submits]), timeout=60))


def test_other_calls_of_the_gateway(cluster: Cluster) -> None:
    unknown = [
        cluster.gateway.Generate(GenerateRequest(model="nope", text="x")),
        lambda: cluster.gateway.Tokenize(TokenizeRequest(model="nope", text="x")),
        lambda: cluster.gateway.Detokenize(DetokenizeRequest(model="nope")),
        cluster.executor.LoadEngine(LoadEngineRequest(model="nope")),
    ]
    for call in unknown:
        found = failed(call)
        assert (found.code, found.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
        assert found.message == "no model 'nope'; there are: tiny"
    both = failed(lambda: cluster.gateway.Tokenize(TokenizeRequest(model="tiny", text="x", chat=chat(("user", "x")))))
    assert (both.code, both.reason) == ("INVALID_ARGUMENT", "PROMPT_AMBIGUOUS")
    outside = failed(lambda: cluster.gateway.Detokenize(DetokenizeRequest(model="tiny", token_ids=[VOCAB_SIZE])))
    assert (outside.code, outside.reason) == ("INVALID_ARGUMENT", "TOKEN_ID_INVALID")
    found = failed(cluster.executor.LoadEngine(LoadEngineRequest(engine_id="0" * 64)))
    assert (found.code, found.reason) == ("NOT_FOUND", "ENGINE_NOT_FOUND") and "000000000000" in found.message


def test_a_prompt_that_is_larger_than_a_message(cluster: Cluster) -> None:
    request = GenerateRequest(model="tiny", text="x" * (65 << 20))
    found = failed(cluster.gateway.Generate(request, timeout=60))
    assert found.code == "RESOURCE_EXHAUSTED" and "larger than max" in found.message
    serves(cluster)


def test_what_is_no_message(cluster: Cluster) -> None:
    """A text that is no UTF-8, from a client whose language lets it through."""
    text = b"\x12\x02\xff\xfe"
    calls = [
        cluster.channels["gateway"].unary_stream("/enginehouse.v1.Gateway/Generate")(text, timeout=60),
        cluster.channels["executor_svc"].unary_stream("/enginehouse.v1.Executor/Generate")(text, timeout=60),
        cluster.channels["executor_svc"].stream_stream("/enginehouse.v1.Executor/Run")(iter([b"\xff"]), timeout=60),
    ]
    for call in calls:
        found = failed(call)
        assert (found.code, found.reason) == ("INVALID_ARGUMENT", "REQUEST_MALFORMED")
        assert "check the client's .proto files, and that its texts are UTF-8" in found.message


def test_too_many_requests_are_refused_with_a_time_to_come_back(cluster: Cluster) -> None:
    long = stopping(max_tokens=200, ignore_eos=True)
    submits = [cluster.submit(**long) for _ in range(MAX_BATCH_SIZE + MAX_WAITING + 1)]
    behind = cluster.submit(engine_id="0" * 64)  # which the front refuses, when it has told the worker of the others
    with standing(cluster.worker):
        call = cluster.executor.Run(iter([Command(submit=submit) for submit in (*submits, behind)]), timeout=60)
        assert [item.handle for item in next(call).failed] == [behind.handle]
    failures = {item.handle: item.failure for output in call for item in output.failed}
    assert list(failures) == [submits[-1].handle], "the last one, and no other"
    refusal = failures[submits[-1].handle]
    assert (refusal.code, refusal.reason) == (8, "QUEUE_FULL")
    assert f"the limit is {MAX_WAITING}" in refusal.message and "try again in " in refusal.message
    assert 1 <= refusal.retry_delay.ToTimedelta().total_seconds() <= 60

    request = GenerateRequest(model="tiny", token_ids=ids(5), **long)
    calls = [cluster.gateway.Generate(request, timeout=60) for _ in range(3 * (MAX_BATCH_SIZE + MAX_WAITING))]
    refused, served = [], 0
    for call in calls:
        try:
            served += sum(len(part.token_ids) for part in call) == 200
        except grpc.RpcError:
            refused.append(failed(call))
    assert refused and served >= MAX_BATCH_SIZE + MAX_WAITING and served + len(refused) == len(calls)
    for found in refused:
        assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert found.retry_after is not None and 1 <= found.retry_after <= 60
        assert f"try again in {found.retry_after:.0f} s" in found.message


def test_a_deadline_that_passes_while_it_waits(cluster: Cluster) -> None:
    long = stopping(max_tokens=200, ignore_eos=True)
    late = cluster.submit(timeout={"nanos": 5_000_000})
    outputs = run(cluster, [*(cluster.submit(**long) for _ in range(MAX_BATCH_SIZE)), late])
    failures = {item.handle: item.failure for output in outputs for item in output.failed}
    assert (failures[late.handle].code, failures[late.handle].reason) == (4, "DEADLINE_EXCEEDED")
    assert failures[late.handle].message.startswith("the deadline passed before the request was started: give it more")
    assert late.handle not in [started.handle for output in outputs for started in output.started]


# Loads


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "device",
            (
                *("it needs device 'cuda'", "this executor runs on 'cpu'"),
                *("it needs compute capability 9.0", "this node has no NVIDIA GPU"),
            ),
        ),
        ("opset", ("it needs operator set 99", f"this executor has {OPSET_VERSION}")),
    ],
)
def test_an_engine_for_another_node(cluster: Cluster, kind: str, says: tuple[str, ...]) -> None:
    found = failed(cluster.executor.LoadEngine(LoadEngineRequest(engine_id=cluster.others[kind].engine_id)))
    assert (found.code, found.reason) == ("FAILED_PRECONDITION", "ENGINE_FINGERPRINT_MISMATCH")
    assert all(part in found.message for part in says), found.message
    command = re.search(r"Build one that fits: (.*)$", found.message)
    assert command
    assert parsed(command[1]) == {
        "checkpoint": str(cluster.root / "checkpoints" / "with a space"),
        "device": "cpu",
        "store": cluster.store.url,
    }
    only_tiny_is_loaded(cluster)


def parsed(command: str) -> dict[str, Any]:
    """What the real command line understands of a command, less what it is not told."""
    program, *arguments = shlex.split(command)
    assert program == "enginehouse"
    with click.Context(main) as context:
        name, found, rest = main.resolve_command(context, arguments)
        assert name == "build" and found
        made = found.make_context(name, rest)
    given = click.core.ParameterSource.COMMANDLINE
    return {key: value for key, value in made.params.items() if made.get_parameter_source(key) is given}


@pytest.mark.parametrize(
    ("damage", "reason", "says"),
    [
        ("flipped", "CHUNK_DIGEST_MISMATCH", "chunk 0 (from byte 0) does not match its digest"),
        ("truncated", "OBJECT_TRUNCATED", "ends at byte"),
    ],
)
def test_a_damaged_engine_is_never_loaded(cluster: Cluster, damage: str, reason: str, says: str) -> None:
    manifest = cluster.others["damaged"]
    path = cluster.root / "store" / blob_key(manifest.ranks[0].weights[0].digest)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged if damage == "flipped" else whole[:-1])
    found = failed(cluster.executor.LoadEngine(LoadEngineRequest(engine_id=manifest.engine_id), timeout=60))
    path.write_bytes(whole)
    assert (found.code, found.reason) == ("DATA_LOSS", reason)
    assert manifest.ranks[0].weights[0].digest[:12] in found.message and says in found.message
    assert "and build the engine again" in found.message, found.message
    only_tiny_is_loaded(cluster)
    refused = failed(cluster.executor.Generate(cluster.submit(engine_id=manifest.engine_id)))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "ENGINE_NOT_LOADED")


def only_tiny_is_loaded(cluster: Cluster) -> None:
    engines = cluster.executor.GetStatus(GetStatusRequest()).engines
    assert [(engine.engine_id, engine.state) for engine in engines] == [(cluster.engine_id, ENGINE_STATE_READY)]
    serves(cluster)


# Builds


def change(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_shard(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    save_file(dict(list(tensors.items())[::2]), path / "part-1.safetensors")
    files = {name: f"part-{1 + index % 2}.safetensors" for index, name in enumerate(tensors)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


BUILDS: dict[str, tuple[Callable[[Path], Any], str, str, str, str]] = {
    "architecture": (
        lambda path: change(path, architectures=["MambaForCausalLM"]),
        "UNIMPLEMENTED",
        "ARCHITECTURE_UNSUPPORTED",
        "MambaForCausalLM",
        "supported are FalconForCausalLM, GPT2LMHeadModel, ",
    ),
    "truncated": (cut, "DATA_LOSS", "WEIGHTS_DAMAGED", "truncated/model.safetensors is damaged", "download it again"),
    "shard": (lose_a_shard, "NOT_FOUND", "WEIGHTS_NOT_FOUND", "shard lacks part-2.safetensors", "download that file"),
    "tokenizer": (
        lambda path: (path / "tokenizer.json").unlink(),
        "FAILED_PRECONDITION",
        "TOKENIZER_NOT_FOUND",
        "tokenizer holds no tokenizer.json",
        "Put the model's tokenizer.json beside its config.json",
    ),
    "field": (
        lambda path: change(path, hidden_size=...),
        "INVALID_ARGUMENT",
        "CONFIG_FIELD_MISSING",
        "field/config.json has no 'hidden_size'",
        "add it",
    ),
    "json": (
        lambda path: (path / "config.json").write_text("{"),
        "INVALID_ARGUMENT",
        "JSON_INVALID",
        "json/config.json is not valid JSON",
        "download it again",
    ),
    "vocabulary": (
        lambda path: change(path, vocab_size=100),
        "INVALID_ARGUMENT",
        "TOKENIZER_MISMATCH",
        "vocab_size is 100",
        "take the tokenizer.json of these weights",
    ),
}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, checkpoint: Path) -> dict[str, Build]:
    """All bad builds, under names that nothing has, to their ends; and nothing of them is left."""
    before = cluster.files()
    submitted = {}
    for case, (spoil, *_) in BUILDS.items():
        spoil(shutil.copytree(checkpoint, cluster.root / "checkpoints" / case))
        request = SubmitBuildRequest(spec=BuildSpec(checkpoint=case), model=f"bad-{case}")
        submitted[case] = cluster.builder.SubmitBuild(request)
    ended = {
        case: list(cluster.builder.WatchBuild(WatchBuildRequest(build_id=job.build_id), timeout=120))[-1].state
        for case, job in submitted.items()
    }
    deadline = time.monotonic() + 60
    while list((cluster.root / "store" / "queue").iterdir()):  # the records of the last one are still being written
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert cluster.files() == before
    assert not list((cluster.root / "work").iterdir())
    return ended


@pytest.mark.parametrize("case", BUILDS)
def test_a_build_of_a_bad_checkpoint(jobs: dict[str, Build], case: str) -> None:
    _, code, reason, value, fix = BUILDS[case]
    job = jobs[case]
    assert job.state == BUILD_STATE_FAILED and not job.engine_id
    assert (job.failure.code, job.failure.reason) == (getattr(grpc.StatusCode, code).value[0], reason)
    assert value in job.failure.message and fix in job.failure.message, job.failure.message


def test_builds_that_are_never_begun(cluster: Cluster) -> None:
    for checkpoint, code, value in (("nowhere", "NOT_FOUND", "'nowhere'"), ("../..", "PERMISSION_DENIED", "'../..'")):
        request = SubmitBuildRequest(spec=BuildSpec(checkpoint=checkpoint))
        found = failed(lambda request=request: cluster.builder.SubmitBuild(request))
        assert found.code == code and value in found.message
    request = SubmitBuildRequest(spec=BuildSpec(checkpoint="field", max_seq_len=0))
    found = failed(lambda: cluster.builder.SubmitBuild(request))
    assert found.code == "INVALID_ARGUMENT" and "max_seq_len is 0: it must be at least 1" in found.message
