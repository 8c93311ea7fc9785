"""The commands of the pages that have no test of their own, typed in their order as somebody follows them.

`enginehouse up` goes on until the page ends, on free ports; everything else comes to its end. A command that needs what a test
does not have says so in the page (`tests/documents.py`).
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from enginehouse.process import service_environment
from tests.documents import OWN, PAGES, ROOT, commands

pytestmark = pytest.mark.drill

FOLLOWED = [page for page in PAGES if page not in OWN and commands(page)]
PYTHON = shlex.quote(sys.executable)


def installed(command: str) -> str:
    """With the programs of this environment, where a program's name may stand."""
    here = re.sub(r"(^|[|&] |-- |=\S+ )enginehouse ", rf"\1{PYTHON} -m enginehouse ", command, flags=re.MULTILINE)
    return re.sub(r"(^|[|&] )python ", rf"\1{PYTHON} ", here, flags=re.MULTILINE)


class Reader:
    """Somebody who types in a directory where `examples` is, and has a model `demo`.

    Args:
        home: a reader's that has the model; else it is built.

    Attributes:
        places: where the cluster that was started last is, instead of at its usual ports.
    """

    def __init__(self, directory: Path, home: Path | None = None) -> None:
        self.directory = directory
        self.environment = {**service_environment(), "ENGINEHOUSE_HOME": str(directory / "home")}
        self.places: dict[str, str] = {}
        (directory / "examples").symlink_to(ROOT / "examples")
        if home:
            shutil.copytree(home, directory / "home")
        else:
            self.type_in("enginehouse build examples/demo-model --name demo --max-seq-len 128")

    def type_in(self, command: str) -> str:
        """Returns what it prints; it has to end well."""
        here = installed(command)
        for usual, place in self.places.items():
            here = here.replace(usual, place)
        done = subprocess.run(
            ["bash", "-ec", here], cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    @contextmanager
    def cluster(self, command: str) -> Iterator[None]:
        """One that a command starts, until the block ends."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {installed(command)} --port 0 --json"],
            cwd=self.directory, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line, (command, process.stderr.read())
            state = json.loads(line)
            self.places = {"127.0.0.1:8400": state["gateway"]}
            if state.get("http"):
                self.places["http://127.0.0.1:8480"] = state["http"]
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert process.returncode in (0, 130), command


def known(page: str, reader: Reader, command: str) -> str:
    """A command with what a reader finds out instead of the page's example of it."""
    if page == "migrating-from-tensorrt-llm.md" and "4f1c09aa2b7d" in command:
        program = "from enginehouse import LLM\nwith LLM('examples/demo-model') as llm: llm.save('demo.engine')"
        reader.type_in(f"[ -d demo.engine ] || python -c {shlex.quote(program)}")
        (engine,) = json.loads(reader.type_in("enginehouse engines ls --store ./demo.engine --json"))
        return command.replace("4f1c09aa2b7d", engine["engine_id"])
    if page == "security.md" and "4f0c9b21" in command:
        (key,) = json.loads((reader.directory / "api-keys.json").read_text())["keys"]
        return command.replace("4f0c9b21", key["id"])
    return command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Reader(tmp_path_factory.mktemp("first")).directory / "home"


@pytest.mark.parametrize("page", FOLLOWED)
def test_every_command(page: str, home: Path, tmp_path: Path) -> None:
    reader, up = Reader(tmp_path, home), False
    with ExitStack() as running:
        for command in commands(page):
            starts = re.search(r"(^| )enginehouse up ", command)
            if starts and " -- " not in command:
                running.close()  # the one before would be found running
                running.enter_context(reader.cluster(command))
                up = True
                continue
            takes_one = re.search("enginehouse (generate|chat|bench) ", command)
            if takes_one and not (up or starts):
                running.enter_context(reader.cluster("enginehouse up demo"))
                up = True
            reader.type_in(known(page, reader, command))
