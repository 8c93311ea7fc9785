"""A build's job in the store: a log that every builder can read, and that one at a time moves on.

builds/<build_id>/<number>.json   a segment of the log, create-only with a rising number
queue/<build_id>                  there is such a job, and it has not ended
joins/<digest>                    the open job that a request with this digest joins
ended/<build_id>.json             the job as it ended

Whoever creates the next number has written, and for everybody else the collision is the news. So this one mechanism orders
the events, gives a job to one builder and fences off the others: a builder claims a job with a segment and keeps it by
writing every few seconds; when the log has not grown for some time, another one gives the job free, and the first, if it
still lives, finds its next number taken and stops. No clocks of two machines are compared.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import msgspec
from google.protobuf import json_format

from builder_svc.job import Job, has_ended
from builder_svc.process import BuildRequest
from engine.errors import DataLoss, NotFound, ResourceExhausted, Unavailable
from engine.manifest import canonical_json
from engine.store import Store
from protos.v1.builder_pb2 import Build, BuildEvent, BuildSpec

MAX_OPEN_JOBS = 1000
MAX_LISTED = 100  # jobs that have ended, in a listing

_ID = re.compile(r"[0-9a-f]{24}")
_SEGMENT = re.compile(r"/[0-9]{8}\.json$")
_PARALLEL_READS = 8

Action = Literal["submit", "claim", "write", "release", "expire", "cancel"]


class Segment(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of a job's log.

    Attributes:
        action: "submit": there is a job; "claim": the writer has it from now on; "write": it goes on; "release": its builder
            gives it back; "expire": another builder says that its builder has died; "cancel": somebody wants it to end.
        writer: which builder wrote this.
        events: of the job, in the JSON form of protobuf.
        request: what is to be built, with "submit".
    """

    action: Action
    writer: str
    events: list[dict[str, Any]] = []
    request: BuildRequest | None = None


class JobLog:
    """What has been read and written of one job's log. One thread at a time may call `refresh` and `append`.

    Attributes:
        events: all so far; only ever appended to.
        owner: the builder that has the job; empty while it is queued, and when it has ended.
        deaths: how many builders died of it, or with it.
        cancel_requested: somebody wants it to end.
        number: of the next segment.
    """

    def __init__(self, store: Store, build_id: str) -> None:
        self.build_id = build_id
        self.events: list[BuildEvent] = []
        self.owner = ""
        self.deaths = 0
        self.cancel_requested = False
        self.number = 0
        self._store = store
        self._request: BuildRequest | None = None
        self._build = Build()

    @property
    def build(self) -> Build:
        """The job by its last state."""
        return self._build

    @property
    def request(self) -> BuildRequest:
        """What is to be built. Raises DataLoss if the log does not say it."""
        if self._request is None:
            raise self._damaged(f"builds/{self.build_id} lacks the request")
        return self._request

    @property
    def ended(self) -> bool:
        """Whether the job has; false for one that there is not."""
        return self.number > 0 and has_ended(self._build)

    def refresh(self) -> None:
        """Reads what is new. Raises DataLoss for a segment that cannot be read."""
        if self.number == 0:
            found = [entry.key for entry in self._store.list(f"builds/{self.build_id}/") if _SEGMENT.search(entry.key)]
            if found and found != [self._key(number) for number in range(len(found))]:
                raise self._damaged(f"builds/{self.build_id} lacks a segment")
            with ThreadPoolExecutor(_PARALLEL_READS, "job-read") as pool:
                for data in pool.map(self._store.read, found):
                    self._decode(data)
        while True:
            try:
                data = self._store.read(self._key(self.number))
            except NotFound:
                return
            self._decode(data)

    def append(
        self, action: Action, writer: str, events: Sequence[BuildEvent] = (), request: BuildRequest | None = None
    ) -> bool:
        """Writes the next segment, made of what has been read.

        False, with nothing written, if the job has ended or somebody else has written that segment: `refresh` tells what.
        """
        if self.ended:
            return False
        fields = [json_format.MessageToDict(event, preserving_proto_field_name=True) for event in events]
        segment = Segment(action, writer, fields, request)
        if not self._store.create(self._key(self.number), msgspec.json.encode(segment)):
            return False
        self._fold(segment, events)
        return True

    def _key(self, number: int) -> str:
        return f"builds/{self.build_id}/{number:08d}.json"

    def _decode(self, data: bytes) -> None:
        try:
            segment = msgspec.json.decode(data, type=Segment)
            events = [json_format.ParseDict(event, BuildEvent()) for event in segment.events]
        except (msgspec.MsgspecError, json_format.ParseError) as error:
            raise self._damaged(f"{self._key(self.number)} cannot be read ({error})") from None
        self._fold(segment, events)

    def _damaged(self, what: str) -> DataLoss:
        return DataLoss(
            f"{what} in {self._store.url}: delete queue/{self.build_id} and builds/{self.build_id}/, and submit the build again",
            reason="BUILD_RECORD_INVALID",
        )

    def _fold(self, segment: Segment, events: Sequence[BuildEvent]) -> None:
        self.number += 1
        self._request = segment.request or self._request
        self.events += events
        for event in events:
            if event.HasField("state"):
                self._build = event.state
        if segment.action == "claim":
            self.owner = segment.writer
        elif segment.action in ("release", "expire"):
            self.owner = ""
            self.deaths += segment.action == "expire"
        elif segment.action == "cancel":
            self.cancel_requested = True
        if self.ended:
            self.owner = ""


def submit(store: Store, writer: str, request: BuildRequest, spec: BuildSpec, model: str) -> JobLog:
    """The log of a new job, or of the open one with the same request, whichever builder has it.

    Each step can be repeated: what a submitter that was killed between two of them has left, the next one completes.

    Raises:
        ResourceExhausted: MAX_OPEN_JOBS jobs are open.
    """
    join = _join_key(request, model)
    for _ in range(10):
        log = JobLog(store, f"{time.time_ns():016x}{secrets.token_hex(4)}")
        if not store.create(join, log.build_id.encode()):
            try:
                log = JobLog(store, store.read(join).decode())
            except NotFound:
                continue  # it has just ended
            log.refresh()
            if log.ended or log.cancel_requested:
                store.delete(join)
                continue
            if log.number and store.size(f"queue/{log.build_id}") is not None:
                return log
        elif (waiting := len(open_ids(store))) >= MAX_OPEN_JOBS:
            store.delete(join)
            raise ResourceExhausted(
                f"{waiting} builds are waiting: try again in a minute", reason="QUEUE_FULL", retry_after=60.0
            )
        if log.number == 0 and not log.append("submit", writer, Job.submitted(log.build_id, spec, model), request):
            log.refresh()
        store.create(f"queue/{log.build_id}", b"")
        return log
    raise Unavailable("the same build is being submitted and ended by many: try again", reason="BUILD_CONTENDED")


def leave(store: Store, log: JobLog) -> None:
    """From now on nobody joins the job."""
    join = _join_key(log.request, log.build.model)
    try:
        if store.read(join).decode() == log.build_id:
            store.delete(join)
    except NotFound:
        return


def retire(store: Store, log: JobLog) -> None:
    """Takes a job that has ended out of the queue; harmless if it is repeated."""
    store.replace(f"ended/{log.build_id}.json", json_format.MessageToJson(log.build, indent=1).encode())
    leave(store, log)
    store.delete(f"queue/{log.build_id}")


def open_ids(store: Store) -> list[str]:
    """Jobs that have not ended, oldest first."""
    return [entry.key.split("/")[1] for entry in store.list("queue/")]


def find(store: Store, build_id: str) -> Build:
    """A job as it is now. Raises NotFound."""
    if ended := _read_ended(store, check_id(build_id)):
        return ended
    log = JobLog(store, build_id)
    log.refresh()
    if not log.number:
        raise not_found(build_id)
    return log.build


def check_id(build_id: str) -> str:
    """The id itself. Raises NotFound for what no build can have."""
    if not _ID.fullmatch(build_id):
        raise not_found(build_id)
    return build_id


def not_found(build_id: str) -> NotFound:
    """The error that there is no such build."""
    return NotFound(f"no build {build_id!r}", reason="BUILD_NOT_FOUND", metadata={"build_id": build_id})


def builds(store: Store) -> list[Build]:
    """All jobs that are open and the last MAX_LISTED that have ended, newest first."""
    ended = [entry.key.split("/")[1].removesuffix(".json") for entry in store.list("ended/")][-MAX_LISTED:]
    with ThreadPoolExecutor(_PARALLEL_READS, "job-read") as pool:
        found = pool.map(lambda build_id: _find(store, build_id), {*ended, *open_ids(store)})
        return sorted(filter(None, found), key=lambda build: build.build_id, reverse=True)


def _find(store: Store, build_id: str) -> Build | None:
    try:
        return find(store, build_id)
    except (NotFound, DataLoss):  # removed meanwhile, or of no use: a listing shows the others
        return None


def _read_ended(store: Store, build_id: str) -> Build | None:
    try:
        return json_format.Parse(store.read(f"ended/{build_id}.json"), Build())
    except (NotFound, json_format.ParseError):  # the log itself says more
        return None


def _join_key(request: BuildRequest, model: str) -> str:
    same = {"request": msgspec.to_builtins(request), "model": model}
    return f"joins/{hashlib.sha256(canonical_json(same)).hexdigest()}"
