"""Uploads to S3: files in one request or in parts, in parallel, resumed from the parts that are there."""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from xml.etree import ElementTree

from engine.errors import DataLoss, Unavailable
from engine.s3_client import S3Client
from engine.s3_errors import Refusal
from engine.store import Progress

MIB = 1024 * 1024
PART_SIZE = 16 * MIB
_MOST_PARTS = 10_000  # S3's limit
PARALLEL_PARTS = 4
_ROUNDS = 5  # of one upload that others end
_SENDS = 3  # of one part that arrives damaged
_GONE = {"NoSuchUpload", "InvalidPart"}  # someone else completed or discarded the upload, or sent a part anew
_MD5 = re.compile(r"[0-9a-f]{32}")


class Part(NamedTuple):
    """A part that the store has: bytes, ETag without quotes, seconds since the epoch by the store's clock."""

    size: int
    etag: str
    modified: float


class Upload(NamedTuple):
    """An upload that has neither ended nor been discarded."""

    key: str
    id: str
    initiated: float


class Uploads:
    """What is on its way into a bucket."""

    def __init__(self, client: S3Client, part_size: int) -> None:
        self._client = client
        self._part_size = part_size

    def put(self, key: str, content: memoryview, report: Progress, is_there: Callable[[], bool]) -> None:
        """Makes an object of a file's content, which others may be doing as well.

        Args:
            key: the whole key.
            content: is sent as it lies in memory.
            report: called with what has arrived, in the caller's thread. What it raises ends the upload, which can be resumed.
            is_there: whether the object is whole, asked when someone else ends the upload.
        """
        if len(content) <= self._part_size:
            self._send(key, content, {}, None)
            return
        for _ in range(_ROUNDS):
            parts = self._split(content)
            try:
                upload, kept = self._resume(key, parts)
                sent = self._send_missing(upload, parts, kept, report)
                self._complete(upload, kept | sent)
            except Refusal:
                if is_there():
                    return
                continue
            for other in self._list(key)[0]:  # of no use any more
                if other.key == key:
                    self._abort(other)
            return
        raise Unavailable(
            f"others have ended the upload of {key} {_ROUNDS} times: repeat it", reason="STORE_UNAVAILABLE"
        )

    def discard(self, prefix: str, age: float) -> int:
        """Discards uploads to which nothing was added in the last `age` seconds of the store's clock; returns how many."""
        count = 0
        uploads, now = self._list(prefix)
        for upload in uploads:
            try:
                newest = max([upload.initiated, *(part.modified for part in self._parts(upload).values())])
            except Refusal:
                continue  # it has just ended
            if newest <= now - age:
                self._abort(upload)
                count += 1
        return count

    def _split(self, content: memoryview) -> dict[int, memoryview]:
        size = max(self._part_size, -(-len(content) // (_MOST_PARTS * MIB)) * MIB)
        return {1 + start // size: content[start : start + size] for start in range(0, len(content), size)}

    def _resume(self, key: str, parts: Mapping[int, memoryview]) -> tuple[Upload, dict[int, str]]:
        """The upload of this key that has most of what we would send, and the ETags of its good parts; or a new one."""
        best: tuple[int, Upload, dict[int, Part]] | None = None
        for upload in self._list(key)[0]:
            if upload.key == key:
                there = {
                    number: part
                    for number, part in self._parts(upload).items()
                    if len(parts.get(number, b"")) == part.size
                }
                value = sum(part.size for part in there.values())
                if best is None or value > best[0]:
                    best = value, upload, there
        if best is None:
            answer = self._client.request("POST", key, query={"uploads": ""})
            name = self._client.document(answer).findtext("{*}UploadId") or ""
            return Upload(key, name, 0), {}
        _, upload, there = best
        with ThreadPoolExecutor(PARALLEL_PARTS, "part-digest") as pool:
            digests = dict(zip(there, pool.map(lambda number: _md5(parts[number]).hex(), there), strict=True))
        return upload, {number: part.etag for number, part in there.items() if part.etag == digests[number]}

    def _send_missing(
        self, upload: Upload, parts: Mapping[int, memoryview], kept: Mapping[int, str], report: Progress
    ) -> dict[int, str]:
        """Sends the parts that are not kept; returns their ETags."""
        done, total = sum(len(parts[number]) for number in kept), sum(map(len, parts.values()))
        sent: dict[int, str] = {}
        stop = threading.Event()

        def send(number: int) -> tuple[int, str]:
            query = {"partNumber": str(number), "uploadId": upload.id}
            return number, self._send(upload.key, parts[number], query, stop)

        with ThreadPoolExecutor(PARALLEL_PARTS, "part-upload") as pool:
            sends = [pool.submit(send, number) for number in parts if number not in kept]
            try:
                for ended in as_completed(sends):
                    number, sent[number] = ended.result()
                    done += len(parts[number])
                    report(done, total)
            finally:
                stop.set()
                for pending in sends:
                    pending.cancel()
        return sent

    def _send(self, key: str, body: memoryview, query: Mapping[str, str], stop: threading.Event | None) -> str:
        """Sends a body; returns its ETag, which is its MD5 unless the store encrypts with keys of its own."""
        digest = _md5(body)
        for _ in range(_SENDS):
            answer = self._client.request(
                "PUT", key, query=query, body=body, md5=digest, expected=_GONE, stop=stop, slow=True
            )
            etag = answer.headers.get("ETag", "").strip('"')
            encrypted = answer.headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
            if etag == digest.hex() or encrypted or not _MD5.fullmatch(etag):
                return etag
        where = f"{key} arrives damaged in {self._client.address.name}"
        text = f"{where}: sent {_SENDS} times with MD5 {digest.hex()}, stored as {etag}"
        raise DataLoss(text, reason="UPLOAD_DAMAGED")

    def _complete(self, upload: Upload, etags: Mapping[int, str]) -> None:
        items = (
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{etags[number]}&quot;</ETag></Part>"
            for number in sorted(etags)
        )
        body = f"<CompleteMultipartUpload>{''.join(items)}</CompleteMultipartUpload>".encode()
        self._client.request("POST", upload.key, query={"uploadId": upload.id}, body=body, expected=_GONE, slow=True)

    def _abort(self, upload: Upload) -> None:
        with suppress(Refusal):  # it has just ended
            self._client.request("DELETE", upload.key, query={"uploadId": upload.id}, expected=_GONE)

    def _list(self, prefix: str) -> tuple[list[Upload], float]:
        """Uploads of keys that begin with a prefix, and the store's time before they were listed."""
        found: list[Upload] = []
        now: float | None = None
        markers = {"NextKeyMarker": "key-marker", "NextUploadIdMarker": "upload-id-marker"}
        for page, answer in self._client.pages({"uploads": "", "prefix": prefix}, markers):
            if now is None:
                now = (
                    parsedate_to_datetime(answer.headers["Date"]).timestamp()
                    if "Date" in answer.headers
                    else time.time()
                )
            items = page.iterfind("{*}Upload")
            found += [Upload(_text(item, "Key"), _text(item, "UploadId"), _time(item, "Initiated")) for item in items]
        return found, now or time.time()

    def _parts(self, upload: Upload) -> dict[int, Part]:
        """The parts of an upload by number. Raises Refusal if it has just ended."""
        found = {}
        markers = {"NextPartNumberMarker": "part-number-marker"}
        for page, _ in self._client.pages({"uploadId": upload.id}, markers, upload.key, _GONE):
            for item in page.iterfind("{*}Part"):
                part = Part(int(_text(item, "Size")), _text(item, "ETag").strip('"'), _time(item, "LastModified"))
                found[int(_text(item, "PartNumber"))] = part
        return found


def _md5(data: memoryview) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _text(item: ElementTree.Element, field: str) -> str:
    return item.findtext(f"{{*}}{field}") or ""


def _time(item: ElementTree.Element, field: str) -> float:
    return datetime.fromisoformat(_text(item, field)).timestamp()
