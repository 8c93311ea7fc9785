"""Lines of the log, and the ids of requests."""

import argparse
import asyncio
import io
import json
import logging
import subprocess
import sys

import pytest

from engine.errors import InvalidArgument
from protos import logs


def lines(formatter: logging.Formatter, log: str = "gateway.server", **extra: object) -> list[str]:
    """What a few calls leave on a stream."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger(log)
    logger.addHandler(handler)
    logger.info("two\nlines of %s", "text", extra=logs.fields(**extra))
    try:
        raise ValueError("a\nb")
    except ValueError:
        logger.exception("failed")
    return stream.getvalue().splitlines()


def test_a_json_line_holds_time_level_service_logger_message_fields_and_traceback() -> None:
    first, second = (
        json.loads(line) for line in lines(logs.JsonFormatter("gateway"), queue_ms=1.5, nothing=None, path=io)
    )
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "INFO",
        "service": "gateway",
        "logger": "gateway.server",
        "message": "two\nlines of text",
        "queue_ms": 1.5,
        "path": str(io),
    }
    assert second["level"] == "ERROR" and second["exception"].endswith("ValueError: a\nb")


def test_a_field_does_not_replace_what_every_line_has() -> None:
    (line, _) = lines(logs.JsonFormatter("gateway"), level="none", service="x", request_id="7")
    assert json.loads(line)["level"] == "INFO" and json.loads(line)["service"] == "gateway"
    assert json.loads(line)["request_id"] == "7"


def test_a_request_id_that_is_none_is_cut_short() -> None:
    (line, _) = lines(logs.JsonFormatter("gateway"), request_id="x" * 1_000_000)
    assert json.loads(line)["request_id"] == "x" * logs.MAX_REQUEST_ID


def test_what_is_no_unicode_can_be_logged() -> None:
    (line, _) = lines(logs.JsonFormatter("gateway"), file="\udcff ä")
    assert json.loads(line)["file"] == "\udcff ä"


def test_fields_of_a_text_line_stand_behind_the_message_and_on_its_line() -> None:
    first = "\n".join(lines(logs.TextFormatter("gateway"), engine="ab", finish="a b", text="x\ny", none=None)[:2])
    assert first.endswith(' gateway INFO two\nlines of text engine=ab finish="a b" text="x\\ny"')


async def test_the_current_request_is_on_every_line() -> None:
    async def request(name: str) -> list[object]:
        logs.enter(name)
        return [json.loads(line).get("request_id") for line in lines(logs.JsonFormatter("gateway"))]

    found = await asyncio.gather(request("abc"), request("def"))
    assert found == [["abc", "abc"], ["def", "def"]]
    assert logs.request_id() == ""  # outside of these tasks


@pytest.mark.parametrize("text", ["", "x" * 129, "a\nb", "ä", "\x7f"])
def test_what_is_no_request_id(text: str) -> None:
    with pytest.raises(InvalidArgument, match="printable ASCII") as caught:
        logs.check_request_id(text)
    assert caught.value.reason == "REQUEST_ID_INVALID"


@pytest.mark.parametrize("text", ["a", "x" * 128, "with a blank", "6f9b-11:22/33"])
def test_what_is_a_request_id(text: str) -> None:
    assert logs.check_request_id(text) == text


def test_options_come_from_the_environment_and_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(*arguments: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        logs.add_options(parser)
        return parser.parse_args(arguments)

    assert vars(parse()) == {"log_format": "text", "log_level": "info"}
    monkeypatch.setenv("ENGINEHOUSE_LOG_FORMAT", "json")
    monkeypatch.setenv("ENGINEHOUSE_LOG_LEVEL", "debug")
    assert vars(parse()) == {"log_format": "json", "log_level": "debug"}
    assert parse("--log-format", "text").log_format == "text"
    monkeypatch.setenv("ENGINEHOUSE_LOG_FORMAT", "xml")
    with pytest.raises(SystemExit):
        parse()
    assert "ENGINEHOUSE_LOG_FORMAT is 'xml': set it to one of text, json" in capsys.readouterr().err


MAIN = """
import logging, sys
from engine.errors import InvalidArgument
from protos import rpc
async def run():
    logging.getLogger("gateway.link").debug("ours")
    logging.getLogger("somebody").debug("else's")
    raise InvalidArgument("no such directory")
sys.exit(rpc.main("gateway", run()))
"""


def test_a_service_that_cannot_start_says_so_in_the_log_s_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_LOG_FORMAT", "json")
    monkeypatch.setenv("ENGINEHOUSE_LOG_LEVEL", "debug")
    done = subprocess.run([sys.executable, "-c", MAIN], capture_output=True, text=True, timeout=60)
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert [(line["level"], line["message"]) for line in said] == [("DEBUG", "ours"), ("ERROR", "no such directory")]
