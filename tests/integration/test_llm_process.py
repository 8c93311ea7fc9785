"""The worker process behind an LLM: how it dies, and that it never outlives whoever has made it."""

import gc
import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest

from engine.errors import Unavailable
from enginehouse import LLM, GenerationExecutor, SamplingParams
from executor_svc.launch import Spares
from tests.integration.llm_harness import IDS, LONG, PROMPT, gone, script, workers


def test_a_worker_that_dies_raises_in_every_waiting_call(engine_dir: Path) -> None:
    with GenerationExecutor.create(engine_dir) as executor:
        results = [executor.generate_async([*IDS, number], LONG) for number in range(8)]
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                executor.generate([IDS] * 2, LONG)
            except Unavailable as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        streamed = executor.generate_async(IDS, LONG, streaming=True)
        next(streamed)
        os.kill(executor.worker_pid, signal.SIGKILL)
        killed = time.monotonic()
        for result in results:
            with pytest.raises(Unavailable, match="has ended by SIGKILL: make another one. The end of its log:"):
                result.result()
        with pytest.raises(Unavailable):
            list(streamed)
        thread.join()
        assert len(errors) == 1 and time.monotonic() - killed < 30
        with pytest.raises(Unavailable, match="has ended by SIGKILL"):
            executor.generate(IDS)


def test_the_last_lines_of_its_log_are_told(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that fails in the middle of a step, as a bug would have it."""
    program = textwrap.dedent("""
        import sys
        from executor_svc import runner, worker
        def fail(self, batch):
            raise RuntimeError("the matrix has fallen over")
        runner.TorchRunner.start = fail
        sys.exit(worker.main())
    """)
    monkeypatch.setattr(Spares.__init__, "__defaults__", (("-c", program), None, None))
    with GenerationExecutor.create(engine_dir) as executor, pytest.raises(Unavailable) as caught:
        executor.generate(IDS)
    assert "| RuntimeError: the matrix has fallen over" in caught.value.message
    assert "Traceback" in caught.value.message


def test_forgotten_it_ends_with_its_last_reference(engine_dir: Path) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    made = LLM(engine_dir)
    result = made.generate_async(PROMPT, SamplingParams(max_tokens=4))
    (worker,) = (pid for pid in workers(os.getpid()) if _is_of(made, pid))
    del made
    gc.collect()
    assert result.result(60).outputs[0].length == 4  # what is under way keeps it
    del result
    gc.collect()
    assert gone([worker])
    assert not [thread for thread in threading.enumerate() if thread.name == "enginehouse"][1:]  # the module's own
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 1


def _is_of(llm: LLM, pid: int) -> bool:
    generator = llm._generator
    assert isinstance(generator, GenerationExecutor)
    return generator.worker_pid == pid


def test_a_forked_child_neither_uses_nor_ends_it(engine_dir: Path) -> None:
    process = script(f"""
        import os
        from enginehouse import LLM, EnginehouseError, SamplingParams
        llm = LLM({str(engine_dir)!r})
        if not os.fork():
            try:
                llm.generate({PROMPT!r})
            except EnginehouseError as error:
                llm.shutdown()
                os._exit(0 if "a fork of it" in error.message else 3)
            os._exit(4)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        print(llm.generate({PROMPT!r}, SamplingParams(max_tokens=4)).outputs[0].text)
    """)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "0\n heavens, in the\n"), err


def test_a_script_that_forgets_shutdown_ends_and_leaves_no_process(engine_dir: Path) -> None:
    process = script(f"""
        from enginehouse import LLM, SamplingParams
        llm = LLM({str(engine_dir)!r})
        print(llm._generator.worker_pid)
        print(llm.generate({PROMPT!r}, SamplingParams(max_tokens=4)).outputs[0].text)
        pending = llm.generate_async({PROMPT!r}, SamplingParams(max_tokens=480, ignore_eos=True))
    """)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    worker, said = out.splitlines()
    assert said == " heavens, in the" and gone([int(worker)])


@pytest.mark.parametrize("when", ["generating", "loading"])
def test_ctrl_c_ends_it_at_once_and_leaves_no_process(engine_dir: Path, when: str) -> None:
    process = script(f"""
        import sys
        from enginehouse import LLM, SamplingParams
        print("begin", flush=True)
        llm = LLM({str(engine_dir)!r})
        print("loaded", flush=True)
        while True:
            llm.generate([{PROMPT!r}] * 64, SamplingParams(max_tokens=480, ignore_eos=True))
    """)
    assert process.stdout is not None
    process.stdout.readline()
    if when == "generating":
        process.stdout.readline()
    while not (below := workers(process.pid)):
        assert process.poll() is None
        time.sleep(0.02)
    assert len(below) == 1
    time.sleep(0.5)  # anywhere within
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker gets it, too
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == -signal.SIGINT and err.rstrip().endswith("KeyboardInterrupt")
    assert gone(below)


def test_a_script_that_is_killed_leaves_no_process(engine_dir: Path) -> None:
    process = script(f"""
        from enginehouse import LLM
        llm = LLM({str(engine_dir)!r})
        print("loaded", flush=True)
        input()
    """)
    assert process.stdout is not None
    process.stdout.readline()
    below = workers(process.pid)
    process.kill()
    process.communicate()
    assert len(below) == 1 and gone(below)


def test_after_shutdown_it_says_so(engine_dir: Path) -> None:
    made = LLM(engine_dir)
    pending = made.generate_async(PROMPT, LONG)
    made.shutdown()
    made.shutdown()
    with pytest.raises(Unavailable, match="was shut down"):
        pending.result(60)
    with pytest.raises(Unavailable, match="was shut down"):
        made.generate(PROMPT)
