"""`enginehouse up` as a process, with stand-in services: order, deaths, signals, and that nothing is left behind."""

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import standin
from click.testing import CliRunner

from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound
from enginehouse.cli import main
from enginehouse.cluster import hold_ports
from enginehouse.commands.up import Wanted
from enginehouse.home import DEFAULT_GATEWAY, ClusterState, Home, gateway_address
from enginehouse.process import service_environment
from enginehouse.warden import Warden

UP = [sys.executable, "-m", "enginehouse", "up", "--port", "0"]


class Running:
    """A running `up`, and what it and the stand-ins have said."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def events(self) -> list[str]:
        path = self.folder / "events"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def stopped(self) -> list[str]:
        return [event.removeprefix("stop ") for event in self.events if event.startswith("stop ")]

    def state(self) -> ClusterState:
        found = Home(self.folder / "data").running()
        assert found
        return found

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def until(self, text: str) -> None:
        wait_for(lambda: text in self.said + "\n".join(self.events) or self.process.poll() is not None, text)
        assert text in self.said + "\n".join(self.events), self.said

    def ends(self, number: int | None = None) -> int:
        """Its status, after a signal; by then no process of it is left."""
        if number is not None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        self.nothing_left()
        assert not (self.folder / "data" / "cluster.json").exists() or number == signal.SIGKILL
        return status

    def nothing_left(self) -> None:
        pids = [int(pid) for event in self.events if event.startswith("start ") for pid in event.split()[2:]]
        wait_for(lambda: not any(map(alive, pids)), "an end of all services")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def program(pid: int) -> bytes:
    """The name that a process goes by; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].rpartition(b"/")[2]
    except OSError:
        return b""


def wait_for(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", standin.install(tmp_path / "packages"))
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("STANDIN_EVENTS", str(tmp_path / "events"))
    for name in ("demo", "slow", "broken"):
        (tmp_path / name).mkdir()


Up = Callable[..., Running]


@pytest.fixture
def up(tmp_path: Path, environment: None) -> Iterator[Up]:
    started = []

    def start(*arguments: str, **extra: str) -> Running:
        with open(tmp_path / "stdout", "wb") as out, open(tmp_path / "stderr", "wb") as err:
            process = subprocess.Popen(
                [*UP, *arguments],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                cwd=tmp_path,
                env=os.environ | extra,
                start_new_session=True,
            )
        started.append(Running(process, tmp_path))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait()
        running.nothing_left()


def test_life(up: Up, tmp_path: Path) -> None:
    running = up("demo=demo", "--executors", "2")
    running.until("Ctrl-C stops all of it.")
    state = running.state()
    assert state.pid == running.process.pid
    assert set(state.pids) == {"builder", "executor-1", "executor-2", "gateway"}
    assert all(map(alive, state.pids.values()))
    assert {os.getsid(pid) for pid in state.pids.values()} == set(state.pids.values())
    for said in ("demo: engine", "demo: loaded by 2 executors", state.gateway, state.builder, *state.executors):
        assert said in running.said
    assert "enginehouse generate" in running.said
    assert "enginehouse chat" not in running.said  # the model has no chat template
    assert sorted(path.name for path in (tmp_path / "data/logs").iterdir()) == [
        "builder.log",
        "executor-1.log",
        "executor-2.log",
        "gateway.log",
    ]

    runner = CliRunner()
    answer = runner.invoke(main, ["generate", "hello", "--max-tokens", "3"])  # found through cluster.json
    assert (answer.exit_code, answer.stdout) == (0, "word word word \n")
    second = runner.invoke(main, ["up", "--port", "0"])
    assert second.exit_code == 1
    assert f"error: a cluster runs on {tmp_path}/data already (process {state.pid}, gateway" in second.stderr
    assert "--data" in second.stderr

    assert running.ends(signal.SIGINT) == 0
    assert running.stopped == ["gateway", "executor", "executor", "builder"]


def test_sigterm_and_a_name_in_the_store(up: Up, tmp_path: Path) -> None:
    standin.publish(standin.open_store(str(tmp_path / "data/store")), "known")
    running = up("known")
    running.until("Ctrl-C stops")
    assert running.ends(signal.SIGTERM) == 0
    assert running.stopped == ["gateway", "executor", "builder"]


def test_a_service_dies(up: Up) -> None:
    running = up("demo=demo")
    running.until("Ctrl-C stops")
    os.kill(running.state().pids["executor-1"], signal.SIGKILL)
    assert running.ends() == 1
    assert "error: executor-1 was killed by SIGKILL; the end of its log" in running.said
    assert running.stopped == ["gateway", "builder"]


def test_a_service_dies_while_it_loads(up: Up) -> None:
    running = up("demo=demo", STANDIN="crash:executor")
    assert running.ends() == 1
    assert "error: executor-1 ended with status 3; the end of its log" in running.said
    assert "  | out of memory: 7 GB wanted" in running.said
    assert "Traceback" not in running.said


def test_a_service_does_not_start(up: Up) -> None:
    running = up("demo=demo", STANDIN="fail:gateway silent:builder")
    assert running.ends() == 1
    assert "error: gateway ended with status 1; the end of its log" in running.said
    assert "  | no such device: cpu" in running.said


def test_kill_9_leaves_nothing_and_the_folder_free(up: Up, tmp_path: Path) -> None:
    running = up("demo=demo", "--", "sleep", "600")
    running.until("$ sleep 600")
    wait_for(lambda: len(running.children()) == 5, "three services, the warden, the command")
    children = running.children()
    running.ends(signal.SIGKILL)
    wait_for(lambda: not any(map(alive, children)), "an end of the command and the warden")
    assert (tmp_path / "data/cluster.json").exists()
    assert gateway_address(None, Home(tmp_path / "data")) == DEFAULT_GATEWAY
    Home(tmp_path / "data").lock().close()


def test_ctrl_c_while_building(up: Up) -> None:
    running = up("./slow")
    running.until("the build goes on")
    assert running.ends(signal.SIGINT) == 130
    assert "cancelled build build-1" in running.said
    assert "cancel build-1" in running.events
    assert running.stopped == ["gateway", "executor", "builder"]


def test_a_build_fails(up: Up) -> None:
    running = up("a=broken")
    assert running.ends() == 1
    assert running.said.endswith("error: config.json has no layers\n")


def test_command(up: Up, tmp_path: Path) -> None:
    show = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k[:12] == 'ENGINEHOUSE_'}))"
    running = up("demo=demo", "--", sys.executable, "-c", show)
    assert running.ends() == 0
    told = json.loads((tmp_path / "stdout").read_text())  # nothing else goes to stdout
    assert told.keys() == {"ENGINEHOUSE_GATEWAY", "ENGINEHOUSE_BUILDER", "ENGINEHOUSE_HOME"}
    assert "enginehouse up demo" in running.said
    assert running.stopped == ["gateway", "executor", "builder"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_to_the_command(up: Up, number: signal.Signals) -> None:
    running = up("--", "sleep", "600")
    running.until("$ sleep 600")
    wait_for(lambda: any(program(pid) == b"sleep" for pid in running.children()), "the command")
    assert running.ends(number) == 128 + number
    assert running.stopped == ["gateway", "executor", "builder"]


def test_ctrl_c_of_a_terminal_reaches_the_command_once(environment: None, tmp_path: Path) -> None:
    """And neither the services, which would stop in no order, nor `up`, which waits for the command."""
    (tmp_path / "count.py").write_text(
        "import signal, time; n = []; signal.signal(signal.SIGINT, lambda *_: n.append(1));"
        "print('counting', flush=True); time.sleep(0.3); time.sleep(0.3); print('got', len(n))"
    )
    with terminal([*UP, "--", sys.executable, "count.py"], tmp_path) as (process, master):
        said = b""
        while b"counting" not in said:
            said += os.read(master, 4096)
        os.write(master, b"\x03")
        while b"got 1\r\n" not in said:
            said += os.read(master, 4096)
            assert b"got 2" not in said
        assert process.wait(60) == 0
    assert [event for event in (tmp_path / "events").read_text().splitlines() if event.startswith("stop")] == [
        "stop gateway",
        "stop executor",
        "stop builder",
    ]


@contextmanager
def terminal(command: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process in the foreground of a terminal of its own: a session leader that opens one gets it."""
    master, slave = pty.openpty()
    open_it = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(slave), *command]
    process = subprocess.Popen(open_it, start_new_session=True, cwd=folder)
    try:
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)


def test_port_taken(environment: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["up", "--port", port])
    assert result.exit_code == 1
    assert (
        f"error: cannot listen on 127.0.0.1 port {port}: it is taken; choose another port with --port" in result.stderr
    )


def test_nothing_starts_for_a_model_that_is_not_there(
    environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    standin.publish(standin.open_store(str(tmp_path / "data/store")), "known")
    for wanted, said in (
        (["unknown"], "error: no model 'unknown'; there are: known"),
        (["slow"], "error: no model 'slow'; there are: known. For the checkpoint in this folder: ./slow"),
        ([f"demo={tmp_path}/nowhere"], f"error: {tmp_path}/nowhere is no directory"),
        ([f"{tmp_path}/demo", f"demo={tmp_path}/slow"], "error: two models are called 'demo'"),
        (["known", "--", "no-such-command"], "error: no command 'no-such-command' on the path"),
    ):
        result = CliRunner().invoke(main, ["up", *wanted, "--port", "0"] if "--" not in wanted else ["up", *wanted])
        assert result.exit_code == 1
        assert result.stderr.startswith(said)
    assert not (tmp_path / "events").exists()


def test_the_status_is_the_commands(up: Up) -> None:
    running = up("--", "sh", "-c", "exit 7")
    assert running.ends() == 7
    assert "What was built" not in running.said


def test_usage(environment: None) -> None:
    result = CliRunner().invoke(main, ["up", "--"])
    assert result.exit_code == 2
    assert "a command must stand behind --" in result.stderr
    assert "[-- COMMAND...]" in CliRunner().invoke(main, ["up", "--help"]).stdout


def test_what_a_model_argument_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "bad name").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Wanted.parse("llama") == Wanted("llama")  # a folder does not hide a name
    assert Wanted.parse("./llama") == Wanted("llama", tmp_path / "llama")
    assert Wanted.parse("l=llama/") == Wanted("l", tmp_path / "llama")
    monkeypatch.chdir(tmp_path / "llama")
    assert Wanted.parse(".") == Wanted("llama", tmp_path / "llama")
    for text, kind in (
        ("../bad name", InvalidArgument),
        ("a/b=llama", InvalidArgument),
        ("a=", NotFound),
        ("a=nowhere", NotFound),
    ):
        with pytest.raises(kind):
            Wanted.parse(text)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path))
    home = Home.find()
    assert (home.root, Home.find("x").root) == (tmp_path, Path.cwd() / "x")
    assert gateway_address("h:1", home) == "h:1"
    assert gateway_address(None, home) == DEFAULT_GATEWAY
    (tmp_path / "cluster.json").write_text("{half")
    assert home.running() is None
    with home.lock(), pytest.raises(FailedPrecondition, match=f"process {os.getpid()}"):
        home.lock()
    (tmp_path / "file").touch()
    with pytest.raises(EnginehouseError, match="--data"):
        Home(tmp_path / "file").lock()


def test_the_warden_ends_what_is_left(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    lock = open(tmp_path / "lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    warden = Warden(keep_open=lock.fileno(), grace=0.2)
    processes = [
        subprocess.Popen(
            warden.watched([sys.executable, "-c", deaf]),
            pass_fds=warden.pass_fds,
            start_new_session=leads,
            stdout=subprocess.PIPE,
        )
        for leads in (True, False, True)
    ]
    try:
        for process in processes:
            assert process.stdout
            process.stdout.readline()
        warden.forget(processes[2].pid)
        warden.close()
        assert [process.wait(30) for process in processes[:2]] == [-signal.SIGKILL] * 2
        assert processes[2].poll() is None
    finally:
        lock.close()
        for process in processes:
            process.kill()
            process.communicate()


def test_the_warden_knows_what_was_started_in_the_last_instant(tmp_path: Path) -> None:
    """Its pipe ends only when a process that has just been started has said that it is there."""
    with open(tmp_path / "lock", "w") as lock:
        warden = Warden(keep_open=lock.fileno(), grace=0.2)
        with subprocess.Popen(warden.watched(["sleep", "600"]), pass_fds=warden.pass_fds) as process:
            try:
                warden.close()
                assert process.wait(30) == -signal.SIGTERM
            finally:
                process.kill()


def test_the_lock_is_held_until_the_warden_has_ended(tmp_path: Path) -> None:
    lock = Home(tmp_path).lock()
    warden = Warden(keep_open=lock.fileno())
    (tmp_path / "cluster.lock").write_text("999999999")  # as if its `up` had been killed
    lock.close()
    with pytest.raises(FailedPrecondition, match="still ending"):
        Home(tmp_path).lock()
    warden.close()
    Home(tmp_path).lock().close()


def test_service_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("no_proxy", "example.org")
    made = service_environment()
    assert made["PYTHONPATH"].split(os.pathsep)[0] == "mine"
    assert made["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert made["PYTHONSAFEPATH"] == "1"


def test_held_ports_are_given_to_who_is_told_them_alone() -> None:
    held = hold_ports(20)
    ports = [one.getsockname()[1] for one in held]
    assert len(set(ports)) == 20
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", ports[0]))
    with socket.create_server(("127.0.0.1", ports[0])):  # sets SO_REUSEADDR
        socket.create_connection(("127.0.0.1", ports[0])).close()
    for one in held:
        one.close()
