"""What the tests of the Python API share."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from enginehouse import LLM, SamplingParams
from enginehouse.process import service_environment
from executor_svc.launch import WORKER

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
PROMPT = "In the beginning God created the"
IDS = [0, 1082, 261, 2178, 411, 1859, 285, 261]
LONG = SamplingParams(max_tokens=2000, ignore_eos=True)  # seconds: who cancels it comes before its end


def text(llm: LLM, prompt: Any = PROMPT, **options: Any) -> str:
    return llm.generate(prompt, SamplingParams(**options)).outputs[0].text


def workers(parent: int) -> list[int]:
    """Worker processes below a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            command = (status.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(lines["PPid"]) == parent and WORKER[1].encode() in command:
            found.append(int(status.parent.name))
    return found


def gone(pids: Sequence[int], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def script(code: str, stderr: int = subprocess.PIPE, **environment: str) -> "subprocess.Popen[str]":
    """`python -c`, as somebody who has installed the package would have it, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**service_environment(), **environment},
        start_new_session=True,
    )
