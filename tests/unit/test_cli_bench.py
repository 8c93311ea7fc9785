"""`enginehouse bench`: its arithmetic on known times, and all of it against a gateway whose timing is known."""

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cli_harness
import pytest
import standin
from cli_harness import TimedGateway
from click.testing import CliRunner, Result

from engine.backends import open_store
from engine.errors import InvalidArgument
from enginehouse.benchmark.results import Distribution, Record, percentile, summarize
from enginehouse.benchmark.workload import Length, Workload, read_prompts
from enginehouse.cli import main


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TimedGateway]:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    store = open_store(str(tmp_path / "store"))
    standin.publish(store, "demo")
    with cli_harness.serving(store) as (address, served):
        monkeypatch.setenv("ENGINEHOUSE_GATEWAY", address)
        yield served


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "--input-len", "20", "--output-len", "5", *arguments])


def told(*arguments: str) -> Any:
    result = bench(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# --- arithmetic


def test_a_record_counts_each_token_of_a_message() -> None:
    record = Record(due=10.0)
    for now, count in ((10.5, 1), (10.6, 0), (10.7, 2), (11.0, 3)):
        record.arrived(now, count)
    assert (record.first, record.last, record.tokens) == (10.5, 11.0, 6)
    assert list(record.gaps) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    first_of_three = Record(due=0.0)
    first_of_three.arrived(1.0, 3)
    assert (first_of_three.tokens, list(first_of_three.gaps)) == (
        3,
        [],
    )  # nothing is known about tokens that came together


def test_percentiles_are_those_of_the_statistics_module() -> None:
    values = sorted(random.Random(1).random() for _ in range(101))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for share, expected in ((0.5, cuts[49]), (0.9, cuts[89]), (0.99, cuts[98])):
        assert percentile(values, share) == pytest.approx(expected)
    assert Distribution.of([2.0]) == Distribution(2.0, 2.0, 2.0, 2.0)
    assert Distribution.of([]).median is None


def test_a_point_says_what_its_records_do() -> None:
    records = []
    for number in range(4):
        record = Record(due=float(number), ended=number + 2.0, prompt_tokens=10, cached_tokens=number)
        record.arrived(number + 1.0, 1)
        record.arrived(number + 1.5, 4)
        records.append(record)
    records[2].failure = ("OVERLOADED", "full")
    records[3].cut_off = True
    point = summarize(records, concurrency=2, wanted=6, cpu_seconds=4.75)
    assert (point.requests, point.completed, point.failed, point.cut_off) == (4, 2, 1, 1)
    assert (point.seconds, point.output_tokens, point.cached_tokens) == (5.0, 20, 6)
    assert (point.tokens_per_second, point.requests_per_second) == (4.0, 0.4)
    assert point.ttft == Distribution(1.0, 1.0, 1.0, 1.0)
    assert point.inter_token_latency.p99 == 0.125
    assert point.end_to_end.mean == 2.0
    assert point.failures == {"OVERLOADED": (1, "full")}
    assert point.interrupted and point.saturated and point.client_cpu == pytest.approx(0.95)
    nothing = summarize([], concurrency=1, wanted=1, cpu_seconds=0)
    assert (nothing.seconds, nothing.tokens_per_second, nothing.interrupted) == (0.0, 0.0, True)


# --- workload


def test_prompts_differ_but_for_the_prefix_and_a_seed_repeats_them() -> None:
    work = Workload(7, Length(20, 40), Length(1, 9), ids=range(3, 200), shared_prefix=8)
    asks = list(islice(work.asks("a"), 200))
    prompts = [tuple(ask.prompt) for ask in asks]
    assert {prompt[:8] for prompt in prompts} == {prompts[0][:8]}
    assert len({prompt[8:16] for prompt in prompts}) == 200
    assert {len(prompt) for prompt in prompts} == set(range(20, 41))
    assert {ask.max_tokens for ask in asks} == set(range(1, 10))
    assert asks == list(islice(work.asks("a"), 200))
    other = [ask.prompt for ask in islice(work.asks("b"), 200)]
    assert {tuple(prompt[8:]) for prompt in other}.isdisjoint(prompt[8:] for prompt in prompts)


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of an exponential distribution: mean and standard deviation are 1 / rate (4 standard errors of 4,000)."""
    times = list(islice(Workload(1, Length(1, 1), Length(1, 1)).arrivals(20.0, "x"), 4001))
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert times[0] == 0 and min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.07)
    assert statistics.pstdev(gaps) == pytest.approx(0.05, rel=0.1)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("first\n\n  second \n")
    assert read_prompts(text) == ["first", "  second "]
    lines.write_text('"one"\n[1, 2]\n{"prompt": "two"}\n{"text": "three"}\n{"token_ids": [3]}\n')
    assert read_prompts(lines) == ["one", [1, 2], "two", "three", [3]]
    lines.write_text('"a\u2028b"\n', encoding="utf-8")  # JSON allows it as it is
    assert read_prompts(lines) == ["a\u2028b"]
    for wrong in ("{}", "[]", "[-1]", "[true]", "7", '{"prompt": ["x"]}', "{"):
        lines.write_text(f'"one"\n{wrong}\n')
        with pytest.raises(InvalidArgument, match=r"a\.jsonl:2"):
            read_prompts(lines)
    text.write_text("\n")
    with pytest.raises(InvalidArgument, match="holds no prompt"):
        read_prompts(text)


# --- against a gateway


def test_what_is_measured_is_what_the_gateway_did(gateway: TimedGateway) -> None:
    gateway.first, gateway.gap, gateway.step = 0.3, 0.2, 2  # long, beside what a busy machine adds
    out = told("--requests", "12", "--concurrency", "4", "--warmup", "1", "--seed", "5")
    (point,) = out["points"]
    assert (point["completed"], point["failed"], point["output_tokens"]) == (12, 0, 60)
    assert (point["prompt_tokens"], point["cached_tokens"], gateway.most) == (240, 0, 4)
    measured = gateway.ttft[1:]  # after the warm-up, whose later messages are two
    assert point["ttft"]["median"] == pytest.approx(statistics.median(measured), abs=0.1)
    per_token = [gap / 2 for gap in gateway.gaps[2:]]
    assert point["inter_token_latency"]["median"] == pytest.approx(statistics.median(per_token), abs=0.03)
    assert point["end_to_end"]["mean"] == pytest.approx((sum(measured) + sum(gateway.gaps[2:])) / 12, abs=0.2)
    assert point["output_tokens_per_second"] == pytest.approx(60 / point["seconds"])
    assert 3 * (0.3 + 2 * 0.2) <= point["seconds"] < 30
    assert (point["concurrency"], point["rate"], point["interrupted"]) == (4, None, False)
    assert (out["model"], out["settings"]["seed"], out["settings"]["input_len"]) == ("demo", 5, "20")
    prompts = {tuple(request.token_ids.ids) for request in gateway.requests}
    assert len(prompts) == 13 and all(32 <= token < 127 for prompt in prompts for token in prompt)
    for request in gateway.requests:
        assert request.stopping.ignore_eos and request.stopping.max_tokens == 5
        assert request.sampling.HasField("temperature") and request.sampling.temperature == 0


def test_a_sweep_prints_tables_and_writes_json_and_a_picture(gateway: TimedGateway, tmp_path: Path) -> None:
    gateway.first = gateway.gap = 0.002
    out, picture = tmp_path / "sweep.json", tmp_path / "sweep.svg"
    sweep = ("--requests", "6", "--concurrency", "1,2", "--concurrency", "3", "--warmup", "0")
    result = bench(*sweep, "--out", str(out), "--plot", str(picture))
    assert result.exit_code == 0, result.stderr
    assert [point["concurrency"] for point in json.loads(out.read_text())["points"]] == [1, 2, 3]
    for said in ("Throughput", "output tokens/s", "Latency, ms", "first token", "next token", "whole request", "p99"):
        assert said in result.stdout
    assert "concurrency 3 6 / 6 requests" in result.stderr
    assert "warning: concurrency" not in result.stderr
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg") and len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
    assert bench(*sweep[:2], "--plot", str(tmp_path / "one.png")).exit_code == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_requests_at_a_rate_do_not_wait_for_others(gateway: TimedGateway) -> None:
    gateway.first = 0.5
    (point,) = told("--requests", "20", "--rate", "100", "--output-len", "1", "--warmup", "0", "--seed", "1")["points"]
    assert (point["completed"], point["rate"], point["concurrency"]) == (20, 100, None)
    assert gateway.most > 5  # all come in the time that the first one takes
    assert point["seconds"] < 5  # half of what they would take one after the other


def test_failures_are_counted_with_their_reasons(gateway: TimedGateway) -> None:
    gateway.fails = {1, 3}
    result = bench("--requests", "5", "--warmup", "0")
    assert result.exit_code == 0
    assert "concurrency 1: 2 failed with EXECUTOR_LOST: the executor is gone" in result.stderr
    gateway.reset()
    gateway.fails = set(range(5))
    result = bench("--requests", "5", "--warmup", "0", "--json")
    assert result.exit_code == 1
    (point,) = json.loads(result.stdout)["points"]
    assert (point["failed"], point["completed"], point["output_tokens"]) == (5, 0, 5)
    assert point["failures"] == [{"reason": "EXECUTOR_LOST", "count": 5, "message": "the executor is gone"}]
    assert point["end_to_end"]["median"] is None and point["ttft"]["median"] is not None
    gateway.reset()
    assert "error: the executor is gone" in bench("--requests", "5", "--warmup", "1").stderr


def test_ctrl_c_shows_what_has_been_measured_and_cancels_the_rest(gateway: TimedGateway, tmp_path: Path) -> None:
    gateway.hangs = {3, 4, 5}
    out = tmp_path / "cut.json"
    command = [sys.executable, "-m", "enginehouse", "bench", "--requests", "9", "--concurrency", "3", "--warmup", "0"]
    command += ["--input-len", "20", "--output-len", "5", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while gateway.now < 3 or len(gateway.requests) < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Throughput" in stdout and "interrupted, 3 requests were cut off" in stderr and "Traceback" not in stderr
    point = json.loads(out.read_text())["points"][0]
    assert (point["completed"], point["cut_off"], point["interrupted"]) == (3, 3, True)
    while gateway.now:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert gateway.cancelled == 3


def test_wrong_input(gateway: TimedGateway, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("x\n")
    prompts = ("--prompts", str(tmp_path / "p.txt"))
    for arguments, said in (
        (("--concurrency", "1,x"), "'x' is no number of requests"),
        (("--concurrency", "0"), "0 is not above 0"),
        (("--rate", "-1"), "-1 is not above 0"),
        (("--rate", "nan"), "nan is not above 0"),
        (("--rate", "1", "--concurrency", "1"), "exclude each other"),
        (("--requests", "7", "--concurrency", "2,8"), "--requests 7 cannot be 8 at the same time"),
        (("--input-len", "9-3"), "the lower one first"),
        (("--output-len", "many"), "neither a number of tokens nor LOW-HIGH"),
        (("--shared-prefix", "20"), "must be less than --input-len 20"),
        (("--plot", "x.gif"), "neither .png nor .svg"),
        (prompts, "--prompts and --input-len exclude each other"),
        (("--prompts", str(tmp_path / "none")), "does not exist"),
    ):
        result = bench(*arguments)
        assert (result.exit_code, said in result.stderr) == (2, True), (arguments, result.stderr)
    for arguments, said in (
        (("--input-len", "100", "--output-len", "29"), "demo takes 128 tokens of prompt and completion together"),
        (("--model", "nope"), "no model 'nope'; there are: demo"),
        (("--out", str(tmp_path / "no" / "x.json")), "choose another file"),
        (("--gateway", "127.0.0.1:1"), "no gateway answers at 127.0.0.1:1"),
    ):
        result = bench(*arguments)
        assert (result.exit_code, said in result.stderr) == (1, True), (arguments, result.stderr)
    assert not gateway.requests


def test_prompts_of_a_file_are_sent_in_turn(gateway: TimedGateway, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"one"\n{"token_ids": [5, 6]}\n')
    command = ["bench", "--prompts", str(tmp_path / "p.jsonl"), "--requests", "4", "--output-len", "2", "--warmup", "0"]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert [(r.text, list(r.token_ids.ids)) for r in gateway.requests] == [("one", []), ("", [5, 6])] * 2


def test_a_picture_without_matplotlib(gateway: TimedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench("--plot", "x.svg")
    assert result.exit_code == 1 and "pip install 'enginehouse[plot]'" in result.stderr
    assert not gateway.requests
