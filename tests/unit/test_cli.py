"""What can be typed: parsing, defaults and messages, against a gateway and a builder in this process."""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import standin
from click.testing import CliRunner, Result
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from rich.console import Console

from builder_svc.child import LOG_FORMAT
from engine.backends import open_store
from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from enginehouse.answer import Answer
from enginehouse.cli import main
from enginehouse.client import BuilderClient, GatewayClient
from enginehouse.progress import Bars, format_amount, format_bytes
from protos.v1.builder_pb2 import (
    BUILD_STATE_CANCELLED,
    BUILD_STATE_FAILED,
    BUILD_STATE_RUNNING,
    BUILD_STATE_SUCCEEDED,
    DEVICE_KIND_CPU,
    DEVICE_KIND_CUDA,
    Build,
    BuildEvent,
    BuildProgress,
    BuildSpec,
    ListBuildsResponse,
    OfferCheckpointResponse,
    Quantization,
)
from protos.v1.builder_pb2_grpc import BuilderServicer, add_BuilderServicer_to_server
from protos.v1.common_pb2 import (
    EARLY_STOPPING_NEVER,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    BeamSearch,
    Failure,
    FinishInfo,
    GuidedChoices,
    GuidedDecoding,
    Logprobs,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    Usage,
)
from protos.v1.gateway_pb2 import DetokenizeResponse, GenerateResponse, ListModelsResponse, Model, TokenizeResponse
from protos.v1.gateway_pb2_grpc import GatewayServicer, add_GatewayServicer_to_server

DEMO = Model(name="demo", engine_id="ab" * 32, ready_executors=1, max_seq_len=512, has_chat_template=True)
RAW = Model(name="raw", engine_id="cd" * 32, max_seq_len=128)


class MockGateway(GatewayServicer):
    """Records requests; answers with what was queued: messages, an error to end with, or "wait" until it is cancelled."""

    def __init__(self) -> None:
        self.models = [DEMO, RAW]
        self.requests: list[Any] = []
        self.replies: queue.Queue[list[Any]] = queue.Queue()
        self.cancelled: queue.Queue[bool] = queue.Queue()

    def ListModels(self, request: Any, context: Any) -> ListModelsResponse:
        return ListModelsResponse(models=self.models)

    def Generate(self, request: Any, context: Any) -> Iterator[GenerateResponse]:
        self.requests.append(request)
        replies = self.replies.get_nowait()
        try:
            for reply in replies:
                if isinstance(reply, EnginehouseError):
                    abort(context, reply)
                elif reply == "wait":
                    while context.is_active():
                        time.sleep(0.01)
                else:
                    yield reply
        finally:  # also if the call is cancelled behind a reply, and never goes on here
            if "wait" in replies:
                self.cancelled.put(True)

    def Tokenize(self, request: Any, context: Any) -> TokenizeResponse:
        return TokenizeResponse(token_ids=[0, *map(len, request.text.split())])

    def Detokenize(self, request: Any, context: Any) -> DetokenizeResponse:
        return DetokenizeResponse(text="".join(f" w{token_id}" for token_id in request.token_ids))


class MockBuilder(BuilderServicer):
    """The same for one build."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.events: list[Any] = []
        self.cancelled: list[str] = []

    def SubmitBuild(self, request: Any, context: Any) -> Build:
        self.requests.append(request)
        return Build(build_id="b1", model=request.model)

    def WatchBuild(self, request: Any, context: Any) -> Iterator[BuildEvent]:
        for event in self.events[request.from_sequence :]:
            if event == "lost":
                self.events[self.events.index("lost")] = BuildEvent(log="lost no more")
                abort(context, Unavailable("the builder stops", reason="BUILDER_STOPPING"))
            if event == "wait":
                while context.is_active():
                    time.sleep(0.01)
            else:
                yield event

    def ListBuilds(self, request: Any, context: Any) -> ListBuildsResponse:
        spec = BuildSpec(checkpoint="models/demo")
        running = Build(build_id="b2", state=BUILD_STATE_RUNNING, attempt=2, model="demo", spec=spec)
        ended = Build(build_id="b1", state=BUILD_STATE_SUCCEEDED, attempt=1, engine_id="ef" * 32, spec=spec)
        return ListBuildsResponse(builds=[running, ended])

    def OfferCheckpoint(self, request: Any, context: Any) -> OfferCheckpointResponse:
        self.requests.append(request)
        return OfferCheckpointResponse(checkpoint="upload://kept")

    def CancelBuild(self, request: Any, context: Any) -> Build:
        self.cancelled.append(request.build_id)
        while request.build_id == "orphan" and context.is_active():
            time.sleep(0.01)
        return Build(build_id=request.build_id, state=BUILD_STATE_CANCELLED)


def abort(context: Any, error: EnginehouseError) -> None:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain="enginehouse"))
    status = status_pb2.Status(code=error.code, message=error.message, details=[detail])
    context.abort_with_status(rpc_status.to_status(status))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ENGINEHOUSE_GATEWAY", raising=False)
    monkeypatch.delenv("ENGINEHOUSE_BUILDER", raising=False)
    return tmp_path / "home"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MockGateway, MockBuilder]]:
    server = grpc.server(ThreadPoolExecutor(4))
    gateway, builder = MockGateway(), MockBuilder()
    add_GatewayServicer_to_server(gateway, server)
    add_BuilderServicer_to_server(builder, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setenv("ENGINEHOUSE_GATEWAY", address)
    monkeypatch.setenv("ENGINEHOUSE_BUILDER", address)
    yield gateway, builder
    server.stop(0).wait()


@pytest.fixture
def gateway(server: tuple[MockGateway, MockBuilder]) -> MockGateway:
    return server[0]


@pytest.fixture
def builder(server: tuple[MockGateway, MockBuilder]) -> MockBuilder:
    return server[1]


def enginehouse(*arguments: str, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=input)


def answer(*texts: str, finish: FinishInfo | None = None) -> list[GenerateResponse]:
    last = finish or FinishInfo(reason=FINISH_REASON_LENGTH)
    return [
        GenerateResponse(
            text=text,
            token_ids=[100 + number],
            usage=Usage(prompt_tokens=5, cached_tokens=4, completion_tokens=number),
            finish=last if number == len(texts) else None,
        )
        for number, text in enumerate(texts, 1)
    ]


# --- generate


def test_generate_streams_with_defaults(gateway: MockGateway) -> None:
    gateway.replies.put(answer("Once", " upon", " a time"))
    result = enginehouse("generate", "Tell me", "--stats")
    assert (result.exit_code, result.stdout) == (0, "Once upon a time\n")
    (request,) = gateway.requests
    assert (request.model, request.text, request.stopping.max_tokens) == ("demo", "Tell me", 128)
    sampling = request.sampling
    assert not any(sampling.HasField(name) for name in ("temperature", "top_p", "seed")) and not sampling.top_k
    assert result.stderr.startswith("3 tokens in ")
    for said in (" tokens/s), first token after ", "prompt 5 tokens (4 cached); finish: length"):
        assert said in result.stderr


def test_generate_passes_everything_on(gateway: MockGateway) -> None:
    gateway.replies.put(answer("x"))
    chosen = ["--model", "raw", "--max-tokens", "7", "--stop", "a", "--stop", "b"]
    chosen += ["--temperature", "0", "--top-k", "5", "--top-p", "0.9", "--seed", "3"]
    assert enginehouse("generate", "-", *chosen, input="from stdin\n\n").exit_code == 0
    (request,) = gateway.requests
    assert (request.model, request.text, list(request.stop)) == ("raw", "from stdin\n", ["a", "b"])
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0, 5, 3)
    assert request.sampling.HasField("temperature")
    assert request.sampling.top_p == pytest.approx(0.9)
    assert request.stopping.max_tokens == 7


def test_generate_takes_what_fits_by_default(gateway: MockGateway) -> None:
    refusal = InvalidArgument("too long", reason="CONTEXT_TOO_LONG")
    gateway.replies.put([refusal])
    gateway.replies.put(answer("x"))
    assert enginehouse("generate", "x").stdout == "x\n"
    assert [r.stopping.HasField("max_tokens") for r in gateway.requests] == [True, False]
    gateway.replies.put([refusal])
    assert enginehouse("generate", "x", "--max-tokens", "128").stderr == "error: too long\n"


def test_generate_with_token_ids(gateway: MockGateway) -> None:
    gateway.replies.put(answer("a", "b"))
    result = enginehouse("generate", "[1, 22 333]", "--token-ids")
    assert result.stdout == "101 102 \n"
    assert list(gateway.requests[0].token_ids.ids) == [1, 22, 333]
    wrong = enginehouse("generate", "1 two", "--token-ids")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: 'two' is no token id")


def test_generate_passes_guides_on(gateway: MockGateway, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "object"}')
    grammar.write_text('start: "ä"\n', encoding="utf-8")
    for options, wanted in (
        (["--json-schema", str(schema)], GuidedDecoding(json_schema='{"type": "object"}')),
        (["--grammar", str(grammar)], GuidedDecoding(grammar='start: "ä"\n')),
        (["--regex", "a|b"], GuidedDecoding(regex="a|b")),
        (["--choice", "a", "--choice", "b c"], GuidedDecoding(choices=GuidedChoices(choices=["a", "b c"]))),
        (["--json-object"], GuidedDecoding(json_object=True)),
    ):
        gateway.replies.put(answer("x"))
        assert enginehouse("generate", "x", *options).exit_code == 0
        assert gateway.requests[-1].guided_decoding == wanted
    gateway.replies.put(answer("x"))
    assert enginehouse("generate", "x").exit_code == 0
    assert not gateway.requests[-1].HasField("guided_decoding")
    grammar.write_bytes(b"\xff")
    wrong = enginehouse("generate", "x", "--grammar", str(grammar))
    assert wrong.exit_code == 1 and "grammar.lark cannot be read" in wrong.stderr


def test_generate_json(gateway: MockGateway) -> None:
    gateway.replies.put(answer("ä", "###", finish=FinishInfo(reason=FINISH_REASON_STOP, stop_string="###")))
    told = json.loads(enginehouse("generate", "x", "--json").stdout)
    assert told["text"] == "ä###"
    assert (told["model"], told["token_ids"], told["finish"], told["matched"]) == ("demo", [101, 102], "stop", "###")
    assert told["usage"] == {"prompt_tokens": 5, "cached_tokens": 4, "completion_tokens": 2}
    assert 0 <= told["first_token_seconds"] <= told["seconds"]


def test_generate_passes_all_of_sampling_on(gateway: MockGateway) -> None:
    gateway.replies.put(answer("x"))
    chosen = "--min-p 0.25 --repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 0.5 --priority -2"
    chosen += " --logit-bias 5=-100 --logit-bias 6=2.5 --bad-word a --bad-word b --min-tokens 200 --ignore-eos"
    chosen += " --n 1 --best-of 3 --echo --logprobs 0 --prompt-logprobs 2"
    assert enginehouse("generate", "x", *chosen.split()).exit_code == 0
    (request,) = gateway.requests
    assert request.sampling == SamplingParams(
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={5: -100, 6: 2.5},
    )
    assert request.stopping == StoppingCriteria(max_tokens=200, min_tokens=200, ignore_eos=True)
    assert request.output == OutputOptions(logprobs=0, prompt_logprobs=2)
    assert (request.n, request.best_of, request.echo, request.priority) == (1, 3, True, -2)
    assert list(request.bad_words) == ["a", "b"] and not request.HasField("beam_search")
    gateway.replies.put(answer("x"))
    assert enginehouse("generate", "x", "--beams", "4", "--length-penalty", "0").exit_code == 0
    assert gateway.requests[1].beam_search == BeamSearch(width=4, length_penalty=0)
    assert not any(gateway.requests[1].HasField(name) for name in ("n", "best_of"))
    gateway.replies.put(answer("x"))
    assert (
        enginehouse("generate", "x", "--beams", "2", "--early-stopping", "never", "--diversity-rate", "0.5").exit_code
        == 0
    )
    wanted = BeamSearch(width=2, early_stopping=EARLY_STOPPING_NEVER, diversity_rate=0.5)
    assert gateway.requests[2].beam_search == wanted


def several(*news: tuple[int, str, bool], **fields: Any) -> list[GenerateResponse]:
    """Messages (completion, text, whether it ends) with a token each."""
    length = FinishInfo(reason=FINISH_REASON_LENGTH)
    return [
        GenerateResponse(
            index=index,
            text=text,
            token_ids=[100 + number],
            finish=length if ends else None,
            usage=Usage(prompt_tokens=5, completion_tokens=number),
            **fields,
        )
        for number, (index, text, ends) in enumerate(news, 1)
    ]


def test_several_completions_stand_one_behind_another(gateway: MockGateway) -> None:
    news = several((1, "one", False), (0, "zero", False), (2, "two", True), (0, " ends\n", True), (1, " ends", True))
    gateway.replies.put(news)
    result = enginehouse("generate", "x", "--n", "3", "--stats")
    assert result.stdout == "--- 1 of 3 ---\nzero ends\n--- 2 of 3 ---\none ends\n--- 3 of 3 ---\ntwo\n"
    assert "5 tokens in " in result.stderr and result.stderr.endswith("finish: length\n")
    gateway.replies.put(news)
    assert enginehouse("generate", "1", "--n", "3", "--token-ids").stdout == (
        "--- 1 of 3 ---\n102 104 \n--- 2 of 3 ---\n101 105 \n--- 3 of 3 ---\n103 \n"
    )
    gateway.replies.put(news)
    told = json.loads(enginehouse("generate", "x", "--n", "3", "--json").stdout)
    assert told["text"] == "zero ends\n"
    assert [(one["text"], one["token_ids"], one["finish"]) for one in told["completions"]] == [
        ("zero ends\n", [102, 104], "length"),
        ("one ends", [101, 105], "length"),
        ("two", [103], "length"),
    ]
    for missing in (news[:-1], [message for message in news if message.index != 2]):
        gateway.replies.put(missing)
        assert "ended the stream without a finish" in enginehouse("generate", "x", "--n", "3").stderr


def test_logprobs_are_a_table_for_people_and_rows_for_programs(gateway: MockGateway) -> None:
    prompt = Logprobs(logprobs=[-2.0], top=1, top_token_ids=[7], top_logprobs=[-0.25])
    first = Logprobs(logprobs=[-0.5], top=2, top_token_ids=[101, 8], top_logprobs=[-0.5, -1.0])
    last = Logprobs(logprobs=[-3.0], top=2, top_token_ids=[9, 10], top_logprobs=[-0.125, -1.5])
    echo, begin, end = several((0, "x", False), (0, " a", False), (0, " b", True))
    begin.prompt_logprobs.CopyFrom(prompt)
    begin.logprobs.CopyFrom(first)
    end.logprobs.CopyFrom(last)
    end.cumulative_logprob = -3.5
    gateway.replies.put([echo, begin, end])
    told = json.loads(enginehouse("generate", "xyz", "--echo", "--logprobs", "2", "--json").stdout)
    assert (told["text"], told["token_ids"], told["cumulative_logprob"]) == ("x a b", [101, 102, 103], -3.5)
    assert told["logprobs"] == [
        {
            "token_id": 102,
            "logprob": -0.5,
            "top": [{"token_id": 101, "logprob": -0.5}, {"token_id": 8, "logprob": -1.0}],
        },
        {
            "token_id": 103,
            "logprob": -3.0,
            "top": [{"token_id": 9, "logprob": -0.125}, {"token_id": 10, "logprob": -1.5}],
        },
    ]
    assert told["prompt_logprobs"] == [{"token_id": 3, "logprob": -2.0, "top": [{"token_id": 7, "logprob": -0.25}]}]
    gateway.replies.put([echo, begin, end])
    result = enginehouse("generate", "xyz", "--logprobs", "2")
    assert result.stdout == "x a b\n"
    assert result.stderr.splitlines() == [
        "log-probabilities of the prompt:",
        "token  id  logprob  probability  most probable",
        '" w3"  3   -2.000   13.5%        " w7" 77.9%',
        "log-probabilities of the completion:",
        "token    id   logprob  probability  most probable",
        '" w102"  102  -0.500   60.7%        " w101" 60.7%  " w8" 36.8%',
        '" w103"  103  -3.000   5.0%         " w9" 88.2%  " w10" 22.3%',
    ]


def test_the_help_of_generate_is_in_sections() -> None:
    text = enginehouse("generate", "--help").stdout
    sections = ["Options:", "Choosing tokens:", "Length and end:", "Several completions:", "What is told:"]
    places = [text.index(f"\n{section}\n") for section in sections]
    assert places == sorted(places)
    assert places[1] < text.index("--logit-bias TOKEN=VALUE") < places[2] < text.index("--stop S") < places[3]
    assert "4294967295" not in text
    assert "--beams" not in enginehouse("chat", "--help").stdout


async def test_a_client_in_python_takes_what_the_request_can_say(gateway: MockGateway) -> None:
    async with GatewayClient(os.environ["ENGINEHOUSE_GATEWAY"]) as client:
        gateway.replies.put(several((1, "b", True), (0, "a", True)))
        responses = client.generate(
            "demo", [1, 2], output=OutputOptions(logprobs=1), n=2, best_of=4, echo=True, bad_words=["x"], priority=5
        )
        assert [response.index async for response in responses] == [1, 0]
        request = gateway.requests[0]
        assert (request.n, request.best_of, request.echo, request.priority) == (2, 4, True, 5)
        assert (list(request.bad_words), request.output.logprobs) == (["x"], 1)
        assert await client.detokenize("demo", [3, 4]) == " w3 w4"


@pytest.mark.parametrize(
    ("finish", "said"),
    [
        (FinishInfo(reason=FINISH_REASON_STOP, eos_token_id=0), "stop (end of text)"),
        (FinishInfo(reason=FINISH_REASON_STOP, stop_token_id=7), "stop (token 7)"),
        (FinishInfo(reason=FINISH_REASON_STOP, stop_string="\n"), 'stop ("\\n")'),
        (FinishInfo(reason=FINISH_REASON_LENGTH), "length"),
    ],
)
def test_the_reason_of_an_end(finish: FinishInfo, said: str) -> None:
    taken = Answer()
    taken.add(answer("x", finish=finish)[0])
    assert taken.reason() == said
    assert taken.stats().endswith(f"finish: {said}")
    assert taken.rate() is None  # one token says nothing about a rate


def test_the_model_must_be_chosen_when_several_are_served(gateway: MockGateway) -> None:
    gateway.models = [DEMO, Model(name="other", ready_executors=1)]
    result = enginehouse("generate", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: several models are served: choose one with --model: demo, other\n"
    gateway.models = [RAW]
    assert "error: no model is loaded: start one with `enginehouse up" in enginehouse("generate", "x").stderr


def test_errors_are_one_line_in_the_servers_words(gateway: MockGateway) -> None:
    gateway.replies.put([NotFound("no model 'nope'; there are: demo")])
    result = enginehouse("generate", "x", "--model", "nope")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no model 'nope'; there are: demo\n"
    gateway.replies.put([*answer("begun ", "never")[:1], FailedPrecondition("the engine was unloaded")])
    result = enginehouse("generate", "x")
    assert (result.exit_code, result.stdout) == (1, "begun \n")
    assert result.stderr == "error: the engine was unloaded\n"
    gateway.replies.put(answer("x", "y")[:1])
    assert "ended the stream without a finish" in enginehouse("generate", "x").stderr


def test_no_gateway() -> None:
    result = enginehouse("generate", "x", "--gateway", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: no gateway answers at 127.0.0.1:1: start a cluster with `enginehouse up`, "
        "or say where one is with --gateway HOST:PORT\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", "x", "--gateway", "localhost"], "is not HOST:PORT"),
        (["generate", "x", "--temperature", "-1"], "-1.0 is not in the range x>=0"),
        (["generate", "x", "--top-p", "0"], "0<x<=1"),
        (["generate", "x", "--max-tokens", "0"], "1<=x<=4294967295"),
        (["generate", "x", "--max-tokens", str(2**32)], "4294967296 is not in the range"),
        (["generate", "x", "--min-p", "1.5"], "0<=x<=1"),
        (["generate", "x", "--repetition-penalty", "0"], "x>0"),
        (["generate", "x", "--presence-penalty", "2.5"], "-2<=x<=2"),
        (["generate", "x", "--logit-bias", "5"], "'5' is not TOKEN=VALUE"),
        (["generate", "x", "--logit-bias", "5=101"], "'5=101' is not TOKEN=VALUE"),
        (["generate", "x", "--logit-bias", "5=nan"], "a number from -100 to 100"),
        (["generate", "x", "--logit-bias", "-5=1"], "'-5=1' is not TOKEN=VALUE"),
        (["generate", "x", "--n", "17"], "1<=x<=16"),
        (["generate", "x", "--logprobs", "21"], "0<=x<=20"),
        (["generate", "x", "--length-penalty", "2"], "give --beams, too"),
        (["generate", "x", "--regex", "a", "--choice", "b"], "--regex and --choice exclude each other"),
        (["generate", "x", "--grammar", "no-such-file"], "File 'no-such-file' does not exist"),
        (["generate", "x", "--top-k", str(2**32)], "4294967296 is not in the range"),
        (["build", "x", "--max-seq-len", str(2**32)], "4294967296 is not in the range"),
        (["build", "x", "--store", "y", "--builder", "h:1"], "exclude each other"),
        (["build", "x", "--dtype", "int3"], "'int3' is not one of"),
        (["up", "--executors", "0"], "x>=1"),
        (["nonsense"], "No such command"),
    ],
)
def test_usage_errors_have_status_2(arguments: list[str], said: str) -> None:
    result = enginehouse(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_text_that_is_no_unicode(gateway: MockGateway) -> None:
    assert "not valid Unicode" in enginehouse("generate", "caf\udce9").stderr
    assert "stdin is not UTF-8 text" in enginehouse("generate", "-", input=b"caf\xe9").stderr
    for arguments in (
        ("generate", "x" * 100 + "caf\udce9"),
        ("generate", "x", "--stop", "caf\udce9"),
        ("generate", "x", "--model", "caf\udce9"),
        ("chat", "--system", "caf\udce9"),
        ("build", "caf\udce9", "--name", "x", "--builder", "127.0.0.1:1"),
        ("load", "caf\udce9", "--executor", "127.0.0.1:1"),
    ):
        result = enginehouse(*arguments)
        assert result.exit_code == 1, arguments
        said = result.stderr.splitlines()[-1]
        assert said.startswith("error: text that is not valid Unicode") and "caf\\udce9': give it as UTF-8" in said
    result = enginehouse("chat", input=b"caf\xe9\n")
    assert result.exit_code == 1 and "error: what was typed is not UTF-8 text" in result.stderr
    assert not gateway.requests


async def test_a_client_in_python_refuses_numbers_that_are_no_token_ids() -> None:
    async with GatewayClient("127.0.0.1:1") as client:
        for token in (-1, 2**32):
            with pytest.raises(InvalidArgument, match=f"{token}: token ids, limits and seeds are numbers"):
                client.generate("demo", [token])


def test_ctrl_c_cancels_the_request(gateway: MockGateway, tmp_path: Path) -> None:
    gateway.replies.put([*answer("Once", "never")[:1], "wait"])
    process = started("generate", "x")
    assert process.stdout and process.stderr
    assert process.stdout.read(4) == b"Once"
    process.send_signal(signal.SIGINT)
    assert gateway.cancelled.get(timeout=60)
    assert process.wait(60) == 130
    assert (process.stdout.read(), process.stderr.read()) == (b"\n", b"")
    process.communicate()


def started(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "enginehouse", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# --- chat


def test_chat_keeps_the_conversation(gateway: MockGateway) -> None:
    gateway.replies.put(answer("Hello", "!"))
    gateway.replies.put(answer("Fine."))
    chosen = ["--system", "Be brief.", "--min-p", "0.5", "--bad-word", "x", "--ignore-eos"]
    result = enginehouse("chat", *chosen, input="Hi\n\nHow are you?\n/exit\nnever\n")
    assert (result.exit_code, result.stdout) == (0, "Hello!\nFine.\n")
    assert "Chat with demo." in result.stderr
    said = [[(m.role, m.content) for m in request.chat.messages] for request in gateway.requests]
    begin = [("system", "Be brief."), ("user", "Hi")]
    assert said[0] == begin
    assert said[1] == [*begin, ("assistant", "Hello!"), ("user", "How are you?")]
    for request in gateway.requests:
        assert (request.sampling.min_p, list(request.bad_words), request.stopping.ignore_eos) == (0.5, ["x"], True)
        assert not request.stopping.HasField("max_tokens")
    gateway.replies.put([NotFound("the executor is gone")])
    result = enginehouse("chat", input="Hi\nnever\n")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: the executor is gone")


def test_chat_needs_a_template(gateway: MockGateway) -> None:
    result = enginehouse("chat", "--model", "raw")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: model 'raw' has no chat template: it continues text")
    assert "error: no model 'nope'; there are: demo, raw" in enginehouse("chat", "--model", "nope").stderr


def test_ctrl_c_in_a_chat_ends_the_answer_and_not_the_chat(gateway: MockGateway) -> None:
    gateway.replies.put([*answer("Once", "never")[:1], "wait"])
    gateway.replies.put(answer("again"))
    process = started("chat")
    assert process.stdin and process.stdout
    process.stdin.write(b"Tell\n")
    process.stdin.flush()
    assert process.stdout.read(4) == b"Once"
    process.send_signal(signal.SIGINT)
    assert gateway.cancelled.get(timeout=60)
    rest, _ = process.communicate(b"More\n", timeout=60)
    assert (process.returncode, rest) == (0, b"\nagain\n")
    assert [m.content for m in gateway.requests[1].chat.messages] == ["Tell", "Once", "More"]


# --- models


def test_models_served(gateway: MockGateway) -> None:
    assert enginehouse("models").stdout.splitlines() == [
        "model  engine        executors   max tokens  chat",
        "demo   abababababab  1           512         yes",
        "raw    cdcdcdcdcdcd  not loaded  128         no",
    ]
    assert json.loads(enginehouse("models", "--json").stdout)[1] == {
        "name": "raw",
        "engine_id": "cd" * 32,
        "ready_executors": 0,
        "max_seq_len": 128,
        "chat": False,
    }
    gateway.models = []
    assert enginehouse("models").stdout == "no models yet: enginehouse up NAME=CHECKPOINT\n"


def test_models_stored(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    assert "no models in file://" in enginehouse("models", "--store", store).stdout
    engine_id = standin.publish(open_store(store), "demo")
    assert enginehouse("models", "--store", store).stdout.splitlines() == [
        "model  engine        architecture      for          size",
        f"demo   {engine_id[:12]}  LlamaForCausalLM  float32 cpu  2 B",
    ]
    assert json.loads(enginehouse("models", "--store", store, "--json").stdout)[0]["engine_id"] == engine_id
    assert enginehouse("models", "--store", "s4://x").stderr.startswith("error: 's4://x' is no store")


# --- build


def progress(phase: str, done: int, total: int, unit: str = "") -> BuildEvent:
    return BuildEvent(progress=BuildProgress(phase=phase, done=done, total=total, unit=unit))


def logged(level: int, message: str) -> str:
    """A line of a build's process."""
    return logging.Formatter(LOG_FORMAT).format(logging.LogRecord("x", level, "", 0, message, (), None))


def test_build_by_a_builder(builder: MockBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My-Llama").mkdir()
    monkeypatch.chdir(tmp_path)
    builder.events = [
        BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_RUNNING)),
        progress("weights", 1_000_000, 4_930_000, "bytes"),
        progress("weights", 4_930_000, 4_930_000, "bytes"),
        BuildEvent(log=logged(logging.INFO, "reading") + "\n" + logged(logging.WARNING, "x: dequantized, since [y]")),
        progress("publish", 1, 1),
        BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_SUCCEEDED, engine_id="ef" * 32)),
    ]
    result = enginehouse(
        "build",
        "My-Llama/",
        *["--dtype", "bfloat16", "--device", "cuda", "--compute-capability", "9.0"],
        *["--kv-cache-dtype", "fp8", "--tp", "2", "--pp", "3"],
    )
    assert result.exit_code == 0
    assert "My-Llama: engine efefefefefef, built in " in result.stdout
    assert result.stderr.splitlines() == [
        "My-Llama: weights 4.93 / 4.93 MB",
        "My-Llama: x: dequantized, since [y]",
        "My-Llama: publish done",
    ]
    (request,) = builder.requests
    assert (request.model, request.spec.checkpoint) == ("My-Llama", str(tmp_path / "My-Llama"))
    spec = request.spec
    assert (spec.dtype, spec.target.device, spec.target.compute_capability) == ("bfloat16", DEVICE_KIND_CUDA, "9.0")
    assert (spec.kv_cache_dtype, spec.tp_size, spec.pp_size) == ("fp8", 2, 3)
    assert not any(spec.HasField(name) for name in ("max_batch_size", "max_seq_len", "max_num_tokens"))

    assert not spec.HasField("quantization")

    told = json.loads(
        enginehouse(
            "build", "./elsewhere/x", "--name", "n", "--max-seq-len", "9", "--json", "--quant", "w4a16_awq", "--group-size", "64",
            "--kv-cache-quant", "INT8", "--exclude", "*.o_proj", "--exclude", "lm_head", "--calib-data", "t", "--calib-samples",
            "9",
        ).stdout
    )  # fmt: skip
    assert (told["name"], told["engine_id"], told["reused"]) == ("n", "ef" * 32, False)
    spec = builder.requests[1].spec
    assert (spec.checkpoint, spec.target.device, spec.max_seq_len) == ("./elsewhere/x", DEVICE_KIND_CPU, 9)
    assert not spec.HasField("tp_size") and not spec.HasField("pp_size")
    assert spec.quantization == Quantization(
        quant_algo="W4A16_AWQ", kv_cache_quant_algo="INT8", group_size=64, exclude_modules=["*.o_proj", "lm_head"],
        calib_dataset="t", calib_samples=9,
    )  # fmt: skip
    assert "say how to quantize" in enginehouse("build", "x", "--group-size", "64").stderr


def test_a_build_that_fails(builder: MockBuilder) -> None:
    failure = Failure(code=12, reason="FAMILY_UNKNOWN", message="no family for 'MambaForCausalLM'")
    builder.events = [BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_FAILED, failure=failure))]
    result = enginehouse("build", "x")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no family for 'MambaForCausalLM'\n"
    builder.events = []
    assert "stopped reporting before build b1 had ended" in enginehouse("build", "x").stderr


def test_a_build_whose_builder_is_lost_goes_on_at_the_next(builder: MockBuilder) -> None:
    builder.events = [
        BuildEvent(sequence=0, state=Build(build_id="b1", state=BUILD_STATE_RUNNING)),
        "lost",
        BuildEvent(sequence=2, state=Build(build_id="b1", state=BUILD_STATE_SUCCEEDED, engine_id="ef" * 32)),
    ]
    result = enginehouse("build", "x")
    assert (result.exit_code, result.stderr) == (0, "the builder stops; trying again for 60 s\n")
    assert "engine efefefefefef" in result.stdout and len(builder.requests) == 1


def test_builds_are_listed_and_cancelled(builder: MockBuilder) -> None:
    assert enginehouse("builds", "ls").stdout.splitlines() == [
        "build  state      attempt  model  engine        checkpoint",
        "b2     running    2        demo                 models/demo",
        "b1     succeeded  1               efefefefefef  models/demo",
    ]
    assert [build["state"] for build in json.loads(enginehouse("builds", "ls", "--json").stdout)] == [
        "running",
        "succeeded",
    ]
    assert enginehouse("builds", "cancel", "b2").stdout == "b2: cancelled\n"
    assert builder.cancelled == ["b2"]


def test_logs_of_a_build(builder: MockBuilder) -> None:
    failure = Failure(code=8, reason="STORE_FULL", message="the store is full")
    builder.events = [
        BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_RUNNING, attempt=2)),
        BuildEvent(log="phase weights\nsecond line"),
        progress("weights", 1_000_000, 4_000_000, "bytes"),
        BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_FAILED, failure=failure, attempt=2)),
    ]
    result = enginehouse("builds", "logs", "b1")
    assert (result.exit_code, result.stderr) == (1, "error: the store is full\n")
    assert result.stdout.splitlines() == [
        "1970-01-01 00:00:00 running, attempt 2",
        "phase weights",
        "second line",
        "1970-01-01 00:00:00 weights 1.00 / 4.00 MB",
        "1970-01-01 00:00:00 failed, attempt 2",
    ]


async def test_a_cancel_that_takes_too_long_says_what_goes_on(server: Any, builder: MockBuilder) -> None:
    async with BuilderClient(os.environ["ENGINEHOUSE_BUILDER"]) as client:
        with pytest.raises(Unavailable, match="build orphan has not ended within 0.2 s"):
            await client.cancel("orphan", timeout=0.2)
    assert builder.cancelled == ["orphan"]


def test_builds_without_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no cluster runs on" in enginehouse("builds", "ls").stderr


def test_ctrl_c_cancels_a_build(builder: MockBuilder) -> None:
    builder.events = [progress("program", 1, 1), "wait"]
    process = started("build", "x")
    assert process.stderr
    assert process.stderr.readline() == b"x: program done\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said, builder.cancelled) == (130, b"cancelled build b1\n", ["b1"])


@pytest.mark.parametrize(
    ("arguments", "checkpoint", "name"),
    [
        (["org/Tiny-1.5"], "hf://org/Tiny-1.5", "Tiny-1.5"),
        (["org/tiny@v1", "--name", "n"], "hf://org/tiny@v1", "n"),
        (["org/tiny", "--revision", "v1"], "hf://org/tiny@v1", "tiny"),
        (["hf://gpt2"], "hf://gpt2", "gpt2"),
        (["tiny"], "tiny", "tiny"),
        (["./org/tiny"], "./org/tiny", "tiny"),
        (["/models/org/tiny"], "/models/org/tiny", "tiny"),
    ],
)
def test_what_a_checkpoint_may_be(
    builder: MockBuilder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    checkpoint: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    builder.events = [BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_SUCCEEDED, engine_id="ef" * 32))]
    assert enginehouse("build", *arguments).exit_code == 0
    (request,) = builder.requests
    assert (request.spec.checkpoint, request.model) == (checkpoint, name)


def test_a_directory_goes_before_a_repository(
    builder: MockBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    builder.events = [BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_SUCCEEDED, engine_id="ef" * 32))]
    assert enginehouse("build", "org/tiny").exit_code == 0
    assert builder.requests[0].spec.checkpoint == str(tmp_path / "org/tiny")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./org/tiny", "--revision", "v1"], "a revision is of a repository"),
        (["org/tiny@v1", "--revision", "v2"], "give the revision once"),
        (["./no", "--upload"], "--upload sends a directory or .gguf file of this machine, and ./no is none"),
        (["org/tiny", "--upload"], "hf://org/tiny is none"),
    ],
)
def test_what_a_checkpoint_may_not_be(builder: MockBuilder, arguments: list[str], said: str) -> None:
    result = enginehouse("build", *arguments)
    assert (result.exit_code, builder.requests) == (1, [])
    assert said in result.stderr


def test_an_upload_needs_a_builder(tmp_path: Path) -> None:
    assert "with --builder HOST:PORT" in enginehouse("build", str(tmp_path), "--name", "n", "--upload").stderr


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert "no is no directory" in enginehouse("build", str(tmp_path / "no")).stderr
    assert "../no/no is no directory" in enginehouse("build", "../no/no").stderr


CHECKPOINTS = {  # what is built -> the files beside it, and those that a build reads
    "tiny": (["README.md", "config.json", "model.gguf", "model.safetensors"], ["config.json", "model.safetensors"]),
    "old": (["config.json", "pytorch_model.bin", "training_args.bin"], ["config.json", "pytorch_model.bin"]),
    "one": (["model.gguf", "notes.txt", "tokenizer.json"], ["model.gguf", "tokenizer.json"]),
    "many/b.gguf": (["a.gguf", "b.gguf", "tokenizer.json"], ["b.gguf"]),
    "split/c-00002-of-00002.gguf": (
        ["c-00001-of-00002.gguf", "c-00002-of-00002.gguf", "d.gguf"],
        ["c-00001-of-00002.gguf", "c-00002-of-00002.gguf"],
    ),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_builder_elsewhere_gets_the_files(
    builder: MockBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool, checkpoint: str
) -> None:
    there, wanted = CHECKPOINTS[checkpoint]
    path = tmp_path / checkpoint
    directory = path.parent if path.suffix else path
    directory.mkdir()
    for name in there:
        (directory / name).write_bytes(b"x" * 10)
    if elsewhere:
        monkeypatch.setattr("enginehouse.commands.build.is_loopback", lambda _: False)
    builder.events = [BuildEvent(state=Build(build_id="b1", state=BUILD_STATE_SUCCEEDED, engine_id="ef" * 32))]
    result = enginehouse("build", str(path))
    assert result.exit_code == 0, result.stderr
    offered, request = (builder.requests if elsewhere else [None, *builder.requests])  # fmt: skip
    assert request.spec.checkpoint == ("upload://kept" if elsewhere else str(path))
    assert request.model == {"many/b.gguf": "b", "split/c-00002-of-00002.gguf": "c"}.get(checkpoint, checkpoint)
    if elsewhere:
        assert [(file.name, file.size) for file in offered.files] == [(name, 10) for name in wanted]
        hashed = 10 * len(wanted)
        assert f"{request.model}: hash {hashed} / {hashed} B" in result.stderr
        assert f"{request.model}: send 10 / 10 B" in result.stderr


def test_what_an_upload_cannot_choose(builder: MockBuilder, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "c-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"x")
    result = enginehouse("build", str(tmp_path), "--upload", "--name", "n")
    assert "there are several GGUF files, a.gguf, b.gguf, c-00001-of-00002.gguf: choose one" in result.stderr
    result = enginehouse("build", str(tmp_path / "c-00001-of-00002.gguf"), "--upload", "--name", "n")
    assert "c-00002-of-00002.gguf is no directory and no .gguf file" in result.stderr
    assert builder.requests == []


def test_build_names(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    result = enginehouse("build", str(tmp_path / "a b"))
    assert result.exit_code == 1
    assert "the checkpoint's name 'a b' cannot name a model" in result.stderr
    assert "--name" in result.stderr
    assert "error: model name 'x/y'" in enginehouse("build", str(tmp_path), "--name", "x/y").stderr


# --- progress, start-up


def test_amounts() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 4_934_000, 49_340_000, 999_600, 15_000_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "4.93 MB",
        "49.3 MB",
        "1.00 MB",
        "15.0 GB",
    ]
    assert format_amount(900_000, 4_930_000, "bytes") == "900 kB / 4.93 MB"
    assert format_amount(3, 48, "tensors") == "3 / 48 tensors"
    assert format_amount(3, 0, "bytes") == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_bars(terminal: bool) -> None:
    console = Console(force_terminal=terminal, width=100, record=True, markup=False)
    with console.capture() as captured, Bars(console, "m[0]") as bars:
        for done in (0, 5, 10, 10):
            bars.update("weights", done, 10, "tensors")
        bars.update("unknown", 0, 0)
    if terminal:
        assert "m[0]: weights" in captured.get()
    else:
        assert captured.get() == "m[0]: weights 10 / 10 tensors\n"


def test_start_is_quick() -> None:
    """--help brings neither grpc nor torch nor rich, `import enginehouse` nothing at all."""
    code = (
        "import sys; import enginehouse; few = len(sys.modules)\n"
        "from enginehouse.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'grpc', 'rich', 'msgspec', 'asyncio'} & set(sys.modules)), 'click' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.stdout.splitlines()[-1] == "[] True"


def test_lazy_exports() -> None:
    import enginehouse

    assert enginehouse.EnginehouseError is EnginehouseError
    assert set(enginehouse.__all__) <= set(dir(enginehouse))
    assert all(getattr(enginehouse, name).__name__ for name in dir(enginehouse))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        enginehouse.nonsense  # noqa: B018


def test_a_build_removes_what_a_killed_one_left(checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / "data/work/enginehouse-build-killed"
    left.mkdir(parents=True)
    (left / "rank0-00000.safetensors").write_bytes(bytes(100))
    os.utime(left, (1, 1))
    done = enginehouse("build", str(checkpoint), "--name", "m", "--data", str(tmp_path / "data"))
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "data/work").iterdir()) == []
