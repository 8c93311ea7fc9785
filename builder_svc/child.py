"""The process of one build: `python -m builder_svc.child`, which `builder_svc/process.py` starts and listens to."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from builder_svc.build_config import Progress
from builder_svc.checkpoint import sources
from builder_svc.process import GRACE, BuildRequest, Failed, Progressed, Result
from engine import signing
from engine.backends import TRANSFER_PATIENCE, open_store
from engine.errors import EnginehouseError, ResourceExhausted
from protos.rpc import to_failure

Build = Callable[[BuildRequest, Progress], Result]

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger(__name__)


def build(request: BuildRequest, progress: Progress) -> Result:
    """The build itself."""
    store = open_store(request.store, TRANSFER_PATIENCE)
    work_dir = Path(request.work_dir) if request.work_dir else None
    began, phases = time.monotonic(), list[str]()

    def logged(phase: str, done: int, total: int, unit: str) -> None:
        if phase not in phases:
            phases.append(phase)
            log.info("phase %s, %.1f s after the start", phase, time.monotonic() - began)
        progress(phase, done, total, unit)

    log.info("building %s into %s", request.checkpoint, request.store)
    checkpoint = sources.fetch(request.checkpoint, store, work_dir, logged, not request.options.dummy_weights)
    from builder_svc import pipeline  # imports torch, which takes seconds

    def unsigned(engine_id: str) -> bool:
        return bool(request.signer) and request.signer not in signing.claims(store, engine_id)

    built = pipeline.build(
        checkpoint,
        request.options,
        store=store,
        source=request.checkpoint,
        again=unsigned,
        work_dir=work_dir,
        progress=logged,
    )
    size = sum(file.size for file in built.manifest.files())
    log.info("engine %s, %.1f MB%s", built.manifest.engine_id, size / 1e6, ", found" if built.reused else "")
    return Result(built.manifest.engine_id, built.reused, built.digest if built.ours else "")


def main(build: Build = build) -> int:
    """Takes one request from stdin and writes events to stdout; the exit status.

    SIGTERM ends it in an orderly way, and so does the end of stdin, which comes when the service dies.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no event
    lock = threading.Lock()

    def send(event: Progressed | Result | Failed) -> None:
        with lock:
            events.write(msgspec.json.encode(event) + b"\n")
            events.flush()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _be_first_to_die()
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline()
    threading.Thread(target=_end_with_service, name="end-with-service", daemon=True).start()
    try:
        request = msgspec.json.decode(line, type=BuildRequest)
        result = build(request, lambda *step: send(Progressed(*step)))
    except Exception as error:
        if not isinstance(error, EnginehouseError):
            log.exception("the build failed")
        failure = to_failure(_out_of_memory(error) or error)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        send(Failed(failure.code, failure.reason, failure.message, dict(failure.metadata)))
        return 1
    # The service ends a child that has told all, which may be in the middle of what libraries do at the exit: no traceback.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    send(result)
    return 0


def _end_with_service() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _be_first_to_die() -> None:
    """When memory runs out, the kernel is to end the build and not the service."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _out_of_memory(error: Exception) -> EnginehouseError | None:
    """Of an allocation that failed, whoever tried it: Python, or torch on the CPU or on a GPU."""
    name, text = type(error).__name__, str(error)
    if name in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text:
        return ResourceExhausted(f"the build ran out of memory: {name}: {text}", reason="BUILD_OUT_OF_MEMORY")
    return None


if __name__ == "__main__":
    sys.exit(main())
