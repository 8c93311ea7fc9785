"""The subprocess of a build, with stand-ins that are real processes: whatever one does, it ends, alone and in words."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from builder_harness import child, ends, failure, is_running, real_child

from builder_svc import work_directory
from builder_svc.build_config import BuildConfig
from builder_svc.process import BuildProcess, BuildRequest, Result
from engine.errors import Internal, NotFound, ResourceExhausted

REQUEST = BuildRequest("checkpoint", "file:///store", BuildConfig(dtype="float16", max_seq_len=7))
ENGINE = "0" * 64


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def left(directory: Path) -> list[Path]:
    return list(directory.iterdir())


class Steps(list[tuple[str, int, int, str]]):
    """What was reported, as a progress callback."""

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        self.append((phase, done, total, unit))


@asynccontextmanager
async def running(process: BuildProcess) -> AsyncIterator["asyncio.Task[Result]"]:
    """A run that has reported its first progress."""
    first = asyncio.Event()
    task = asyncio.create_task(process.run(REQUEST, lambda *_: first.set()))
    await asyncio.wait_for(first.wait(), 60)
    yield task
    assert task.done()
    assert process.work_dir and left(process.work_dir) == []


# What comes back


async def test_the_request_goes_in_and_the_result_comes_out(work_dir: Path):
    body = "progress('program', 1, 1, '')\nprint(json.dumps(request), file=sys.stderr)\nresult(reused=True)"
    steps = Steps()
    result = await BuildProcess(child(body), work_dir=work_dir).run(REQUEST, steps)
    assert result == Result(ENGINE, reused=True)
    assert steps == [("program", 1, 1, "")]
    assert left(work_dir) == []


async def test_the_request_is_whole(work_dir: Path):
    body = (
        "assert request['checkpoint'] == 'checkpoint' and request['store'] == 'file:///store', request\n"
        "assert request['options']['dtype'] == 'float16' and request['options']['max_seq_len'] == 7, request\n"
        f"assert os.path.dirname(request['work_dir']) == {str(work_dir)!r} and os.path.isdir(request['work_dir'])\n"
        "open(request['work_dir'] + '/left', 'w').close(); result()"
    )
    await BuildProcess(child(body), work_dir=work_dir).run(REQUEST, Steps())
    assert left(work_dir) == []


async def test_a_failure_comes_out_whole(work_dir: Path):
    body = "send(type='failed', code=5, reason='FILE_NOT_FOUND', message='no weights', metadata={'file': 'x'})"
    error = await failure(BuildProcess(child(body), work_dir=work_dir).run(REQUEST, Steps()))
    assert isinstance(error, NotFound)
    assert (error.reason, error.message, error.metadata) == ("FILE_NOT_FOUND", "no weights", {"file": "x"})


@pytest.mark.parametrize(
    "after", ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSEGV)", "os.close(1); time.sleep(60)"]
)
async def test_the_result_counts_whatever_happens_after_it(work_dir: Path, after: str):
    began = time.monotonic()
    process = BuildProcess(child(f"result()\n{after}"), work_dir=work_dir)
    assert (await process.run(REQUEST, Steps())).engine_id == ENGINE
    assert time.monotonic() - began < 30


# A child that dies


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ResourceExhausted, "was killed by SIGKILL, probably out of memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", Internal, "was killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGTERM)", Internal, "was killed by SIGTERM"),
        ("os._exit(128 + signal.SIGABRT)", Internal, "was killed by SIGABRT"),
        ("os._exit(3)", Internal, "ended with status 3"),
        ("pass", Internal, "ended with status 0"),
    ],
)
async def test_a_child_that_dies_in_words(work_dir: Path, body: str, kind: type, message: str):
    lines = "for line in range(150): print('line', line, file=sys.stderr, flush=True)\n"
    error = await failure(BuildProcess(child(lines + body), work_dir=work_dir).run(REQUEST, Steps()))
    assert type(error) is kind
    first, *log = error.message.splitlines()
    assert first == f"the build process {message}; its last output:"
    assert log == [f"line {line}" for line in range(50, 150)]
    assert left(work_dir) == []


async def test_a_child_that_dies_silently(work_dir: Path):
    error = await failure(BuildProcess(child("os._exit(1)"), work_dir=work_dir).run(REQUEST, Steps()))
    assert error.message == "the build process ended with status 1; it printed nothing"
    assert error.reason == "BUILD_CRASHED"


async def test_a_child_that_does_not_even_read(work_dir: Path):
    error = await failure(BuildProcess([sys.executable, "-S", "-c", ""], work_dir=work_dir).run(REQUEST, Steps()))
    assert "ended with status 0" in error.message


async def test_a_child_that_cannot_be_started(work_dir: Path):
    error = await failure(BuildProcess(["/no/such/program"], work_dir=work_dir).run(REQUEST, Steps()))
    assert isinstance(error, Internal)
    assert "cannot start a build process" in error.message
    assert "/no/such/program" in error.message
    assert left(work_dir) == []


async def test_a_work_dir_that_is_not_there(tmp_path: Path):
    error = await failure(BuildProcess(child("result()"), work_dir=tmp_path / "no").run(REQUEST, Steps()))
    assert error.reason == "BUILD_NOT_STARTED"


async def test_what_killed_builders_have_left_is_cleared_and_nothing_else(work_dir: Path):
    for name in ("enginehouse-build-old", "enginehouse-build-fresh", "mine"):
        (work_dir / name).mkdir()
        (work_dir / name / "weights").write_bytes(b"x")
    for name in ("enginehouse-build-old", "mine"):
        os.utime(work_dir / name, (1, 1))
    process = BuildProcess(child("hang()"), work_dir=work_dir)
    first = asyncio.Event()
    task = asyncio.create_task(process.run(REQUEST, lambda *_: first.set()))
    await asyncio.wait_for(first.wait(), 60)
    (busy,) = (
        path for path in left(work_dir) if path.name not in ("enginehouse-build-old", "enginehouse-build-fresh", "mine")
    )
    os.utime(busy, (1, 1))
    work_directory.clear(work_dir)
    assert sorted(path.name for path in left(work_dir)) == sorted([busy.name, "enginehouse-build-fresh", "mine"])
    task.cancel()
    await asyncio.wait([task])


# A child that talks


async def test_what_is_no_event_is_a_log_line(work_dir: Path):
    body = (
        "print('hello'); print('{\"type\": \"other\"}'); print('{}'); print('[]'); print('')\n"
        "print(json.dumps(dict(type='progress', phase='weights', done=-1, total=2, unit=''))); progress('weights', 2, 2)\n"
        "sys.stdout.buffer.write(b'\\xff\\xfe no text\\n'); print('no end', end='', flush=True); os._exit(1)"
    )
    steps = Steps()
    error = await failure(BuildProcess(child(body), work_dir=work_dir).run(REQUEST, steps))
    assert steps == [("weights", 2, 2, "bytes")]
    assert error.message.splitlines()[1:] == [
        "hello",
        '{"type": "other"}',
        "{}",
        "[]",
        '{"type": "progress", "phase": "weights", "done": -1, "total": 2, "unit": ""}',
        "�� no text",
        "no end",
    ]


async def test_a_child_that_prints_much(work_dir: Path):
    body = (
        "for _ in range(20): sys.stderr.write('noise\\n' * 10_000); sys.stdout.write('noise ' * 100_000 + '\\n')\n"
        "sys.stdout.write('x' * 3_000_000 + '\\n'); sys.stdout.flush(); progress('weights', 1, 1); os._exit(1)"
    )
    steps = Steps()
    error = await failure(BuildProcess(child(body), work_dir=work_dir).run(REQUEST, steps))
    assert steps == [("weights", 1, 1, "bytes")]
    assert len(error.message) < 20_000


# Cancelling


async def test_a_cancelled_child_may_clean_up(work_dir: Path, tmp_path: Path):
    body = (
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'cleaned')!r}, 'w').close(), os._exit(0)))\n"
        "hang()"
    )
    async with running(BuildProcess(child(body), work_dir=work_dir)) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (tmp_path / "cleaned").exists()


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(work_dir: Path, tmp_path: Path):
    body = (
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "hang()"
    )
    async with running(BuildProcess(child(body), work_dir=work_dir, grace=0.3)) as task:
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert 0.3 <= time.monotonic() - began < 50
    assert not is_running(int((tmp_path / "pid").read_text()))


async def test_a_second_cancel_kills_at_once(work_dir: Path, tmp_path: Path):
    body = (
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "hang()"
    )
    async with running(BuildProcess(child(body), work_dir=work_dir, grace=30)) as task:
        task.cancel()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 60)
    assert await ends(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("how", ["cancelled", "killed", "ended"])
async def test_what_a_child_started_ends_with_it(work_dir: Path, tmp_path: Path, how: str):
    after = {"cancelled": "", "killed": "os.kill(os.getpid(), signal.SIGKILL)", "ended": "result(); sys.exit()"}[how]
    body = (
        "other = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\nprogress('weights', 1, 2)\n{after}\nhang()"
    )
    async with running(BuildProcess(child(body), work_dir=work_dir)) as task:
        if how == "cancelled":
            task.cancel()
        await asyncio.wait([task], timeout=50)
        assert task.done()
        assert task.cancelled() or task.exception() or task.result()
    assert await ends(int((tmp_path / "pid").read_text()))


async def test_a_daemon_that_holds_the_pipes_does_not_hold_the_job(work_dir: Path, tmp_path: Path):
    body = (
        "other = subprocess.Popen(['sleep', '40'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\nos._exit(1)"
    )
    began = time.monotonic()
    error = await failure(BuildProcess(child(body), work_dir=work_dir).run(REQUEST, Steps()))
    assert "ended with status 1" in error.message
    assert time.monotonic() - began < 35  # it sleeps for 40 s
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


# The real child, around another build


async def test_the_real_child_builds(work_dir: Path):
    build = (
        "print('a library prints this', flush=True)\n"
        "os.write(1, b'and this\\n')\n"
        "progress('weights', 1, 2, 'bytes')\n"
        "assert request.options.dtype == 'float16' and request.work_dir\n"
        "return Result('0' * 64, False)"
    )
    steps = Steps()
    result = await BuildProcess(real_child(build), work_dir=work_dir).run(REQUEST, steps)
    assert result == Result(ENGINE, reused=False)
    assert steps == [("weights", 1, 2, "bytes")]


@pytest.mark.parametrize(
    ("build", "code", "reason", "message"),
    [
        ("raise NotFound('no file', reason='FILE_NOT_FOUND', metadata={'a': 'b'})", 5, "FILE_NOT_FOUND", "no file"),
        ("raise KeyError('x')", 13, "INTERNAL", "KeyError: 'x'"),
        ("raise MemoryError()", 8, "BUILD_OUT_OF_MEMORY", "the build ran out of memory: MemoryError: "),
        (
            'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")',
            8,
            "BUILD_OUT_OF_MEMORY",
            "the build ran out of memory: RuntimeError: DefaultCPUAllocator: can't allocate memory",
        ),
    ],
)
async def test_the_real_child_fails(work_dir: Path, build: str, code: int, reason: str, message: str):
    error = await failure(BuildProcess(real_child(build), work_dir=work_dir).run(REQUEST, Steps()))
    assert (error.code, error.reason, error.message) == (code, reason, message)


def test_the_real_child_leaves_no_traceback_when_it_is_ended_at_its_exit():
    build = (
        "import atexit\natexit.register(lambda: (os.write(2, b'at its exit\\n'), time.sleep(60)))\n"
        "print('a line', flush=True)\nreturn Result('0' * 64, False)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(real_child(build), **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(msgspec.json.encode(REQUEST) + b"\n")
        process.stdin.flush()
        assert b'"result"' in process.stdout.readline()
        assert [process.stderr.readline() for _ in range(2)] == [b"a line\n", b"at its exit\n"]
        process.terminate()
        process.wait(60)
        assert process.stderr.read() == b""


async def test_the_real_child_cleans_up_when_it_is_cancelled(work_dir: Path, tmp_path: Path):
    build = (
        "try:\n    progress('weights', 1, 2, 'bytes')\n    time.sleep(60)\n"
        f"finally:\n    open({str(tmp_path / 'cleaned')!r}, 'w').close()"
    )
    async with running(BuildProcess(real_child(build), work_dir=work_dir)) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (tmp_path / "cleaned").exists()


SERVICE = """
import asyncio, sys
from builder_svc.process import BuildProcess, BuildRequest
process = BuildProcess(sys.argv[2:], work_dir=sys.argv[1])
asyncio.run(process.run(BuildRequest("checkpoint", "store"), lambda *step: print(step[1], flush=True)))
"""


async def test_no_build_outlives_its_service(work_dir: Path, tmp_path: Path):
    build = (
        "try:\n    progress('pid', os.getpid(), 1 << 40, '')\n    time.sleep(60)\n"
        f"finally:\n    open({str(tmp_path / 'cleaned')!r}, 'w').close()"
    )
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVICE, work_dir, *real_child(build), stdout=subprocess.PIPE
    )
    assert service.stdout
    pid = int(await service.stdout.readline())
    assert is_running(pid)
    service.kill()
    assert await service.wait() == -signal.SIGKILL
    assert await ends(pid)
    assert (tmp_path / "cleaned").exists()
