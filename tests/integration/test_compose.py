"""docker-compose.yml and its README without Docker: each service by the command of its image and of the file, with their
environment and nothing else, where only its extra is installed; the person's commands as they stand in the README.

Only names, ports and paths are other ones; `Cluster.here` has the whole list.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import urllib3

from tests.deployment import README, ROOT, Service, chain, context, image, seconds, services
from tests.integration import services as processes
from tests.seaweed import SeaweedFS

ONLY = Path(processes.__file__).parent / "only_extra"
UP = services({"OMP_NUM_THREADS": "1"})  # the model is small, and the tests' machine, too


class Store(SeaweedFS):
    """The service `store`: SeaweedFS with the file's options and environment."""

    def __init__(self, definition: Service) -> None:
        super().__init__(bucket="")  # the options make one
        self._choose_ports("admin", "admin.grpc")
        self.definition = definition

    def start(self) -> None:
        """Returns when its health check would say yes."""
        here = {"-dir=/data": f"-dir={self.data}", "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1"}
        options = [here.get(option, option) for option in self.definition.command if "-s3.port=" not in option]
        ports = [
            f"-{name.replace('.grpc', '')}.port{'.grpc' * name.endswith('.grpc')}={port}"
            for name, port in self.ports.items()
        ]
        fips = {"GODEBUG": "fips140=on"}  # as the image's entry point has it
        self._launch(*options, *ports, environment={**self.definition.environment, **fips})
        *wget, url = self.definition.definition["healthcheck"]["test"]
        assert wget == ["CMD", "wget", "-q", "-O", "/dev/null"]  # fails unless the answer is a success
        deadline = time.monotonic() + seconds(self.definition.definition["healthcheck"]["start_period"])
        pool = urllib3.PoolManager(retries=False, timeout=2)
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                if pool.request("GET", url.replace(":8888/", f":{self.ports['filer']}/")).status == 200:
                    return
            assert self.process and self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self.directory / "log").read_text()[-2000:]
            time.sleep(0.1)


class Cluster:
    """What `docker compose up` starts.

    Attributes:
        running: the processes of our services.
        homes: of each service, the directories that it could write to: its home, and /tmp.
    """

    def __init__(self, directory: Path, store: Store) -> None:
        self.directory = directory
        self.running: dict[str, processes.Service] = {}
        self.homes: dict[str, tuple[Path, Path]] = {}
        self._store = store

    def here(self, text: str) -> str:
        """A text of the files as it must be on this machine, without containers: their names, ports and directories."""
        replaced = {"store:8333": f"127.0.0.1:{self._store.ports['s3']}", "0.0.0.0": "127.0.0.1"}  # noqa: S104
        replaced["127.0.0.1:8333"] = replaced["store:8333"]
        replaced["/checkpoints"] = str(ROOT / "examples")
        for name, each in UP.items():
            for address, outside, inside in each.ports[:1] if each.target else ():
                process = self.running.get(name)
                replaced[f"{name}:{inside}"] = replaced[f"{address}:{outside}"] = (
                    process.address if process else "127.0.0.1:1"
                )
            replaced[name] = "127.0.0.1"
        pattern = "|".join(map(re.escape, sorted(replaced, key=len, reverse=True)))
        return re.sub(rf"(?<![\w.-])(?:{pattern})(?![\w-])", lambda match: replaced[match[0]], text)

    def environment(self, name: str) -> dict[str, str]:
        """Of a service: the image's and the file's, and a proxy, as Docker hands it on, that nothing may go through."""
        home, temporary = self.homes[name]
        each = UP[name]
        return {
            **{key: self.here(value) for key, value in each.environment.items()},
            "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary),
            "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1",
        }  # fmt: skip

    @contextlib.contextmanager
    def service(self, name: str) -> Iterator[processes.Service]:
        """Starts one: the image's entry point, then the file's command."""
        each = UP[name]
        self.homes[name] = (self.directory / name / "home", self.directory / name / "tmp")
        for path in self.homes[name]:
            path.mkdir(parents=True)
        home = str(self.homes[name][0])
        python, *program = each.image.entrypoint
        assert python == "python"
        arguments = [
            re.sub(
                r"^--metrics-port=\d+$",
                "--metrics-port=0",
                self.here(part).replace(each.image.environment["HOME"], home),
            )
            for part in (*program[2:], *each.command)
        ]
        started = processes.service(
            each.package,
            self.directory / f"{name}.log",
            *arguments,
            program=program[:2],
            environment=self.environment(name),
            alone=True,
        )
        with started as running:
            self.running[name] = running
            assert b"enginehouse_" in urllib3.request("GET", running.metrics).data
            yield running

    def healthy(self, name: str) -> bool:
        """Whether the image's health check says so."""
        each = UP[name]
        inside = f"127.0.0.1:{each.image.exposed[0]}"
        python, *arguments = (part.replace(inside, self.running[name].address) for part in each.image.health)
        assert python == "python"
        only = {"PYTHONPATH": str(ONLY), "ENGINEHOUSE_ONLY": each.package.removesuffix("_svc")}
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**self.environment(name), **only},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode in (0, 1), done.stderr
        assert (done.returncode == 0) == (done.stdout == "SERVING\n"), done.stdout
        return done.returncode == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("compose")
    with contextlib.ExitStack() as stack:
        started = Cluster(directory, stack.enter_context(Store(UP["store"])))
        for name in ("builder", "executor-1", "executor-2", "gateway"):
            stack.enter_context(started.service(name))
        yield started


def commands(section: str) -> list[list[str]]:
    """What a section of the README tells to type, apart from Docker's and pip's part."""
    text = re.split(r"^## ", README.partition(f"## {section}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    found = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")]
    return [command for command in found if command[0] in ("enginehouse", "export")]


def type_in(cluster: Cluster, command: list[str], environment: Mapping[str, str]) -> str:
    arguments = [sys.executable, "-m", "enginehouse", *map(cluster.here, command[1:])]
    done = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (command, done.stderr, *(log.read_text() for log in cluster.directory.glob("*.log")))
    return done.stdout + done.stderr


def test_from_checkpoint_to_text_as_the_readme_says(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cluster.running:
        assert cluster.healthy(name), name
    for variable in UP["store"].environment:
        monkeypatch.delenv(variable, raising=False)
    environment = {"ENGINEHOUSE_HOME": str(cluster.directory / "person")}
    told: dict[str, str] = {}
    for command in commands("From a checkpoint to text"):
        if command[0] == "export":
            environment.update(part.split("=") for part in command[1:])
        elif not any(part.startswith("Qwen/") for part in command):  # the hub is not reached from here
            told[" ".join(command[1:3])] = type_in(cluster, command, environment)
    assert list(told) == [
        "build /checkpoints/demo-model", "load demo", "generate In the beginning", "build examples/demo-model", "builds ls",
        "engines ls", "engines gc",
    ]  # fmt: skip
    assert "built in" in told["build /checkpoints/demo-model"]
    assert "nothing to build" in told["build examples/demo-model"], "the same files, uploaded, are the same engine"
    assert "loaded by 2 executors" in told["load demo"]
    assert re.search(r"\d+ tokens in .*finish: (length|stop)", told["generate In the beginning"])
    assert told["builds ls"].count("succeeded") == 2 and "demo" in told["engines ls"]
    assert "demo" in type_in(cluster, ["enginehouse", "models", "--gateway", "127.0.0.1:8400"], environment)

    for name in ("executor-1", "executor-2", "gateway"):
        assert [list(path.iterdir()) for path in cluster.homes[name]] == [[], []], "its file system is read-only"
    assert {path.name for path in cluster.homes["builder"][0].iterdir()} <= {"uploads", ".cache"}


def test_the_executor_of_the_profile_gpu_comes_up_and_waits(cluster: Cluster) -> None:
    with cluster.service("executor-gpu"):
        assert cluster.healthy("executor-gpu")


@pytest.mark.drill
def test_services_end_in_order_and_are_not_healthy_any_more(cluster: Cluster) -> None:
    for name in ("gateway", "executor-1", "executor-2", "builder"):
        running, each = cluster.running[name], UP[name]
        stop = signal.Signals[each.image.stop_signal]
        running.process.send_signal(stop)
        assert running.process.wait(seconds(each.definition["stop_grace_period"])) == 0, running.log.read_text()
        assert not cluster.healthy(name)
        assert "Traceback" not in running.log.read_text()


@pytest.mark.drill
def test_the_gateway_runs_from_what_its_build_stage_makes(tmp_path: Path) -> None:
    """The stage's own commands, in what .dockerignore lets through, but for apt-get, and with another directory."""
    source, environment = tmp_path / "src", tmp_path / "env"
    for file in context():
        copy = source / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    runs = [command for command in chain("gateway-env") if command.cmd == "RUN" and "apt-get" not in command.value[0]]
    assert len(runs) == 2
    for command in runs:
        (line,) = command.value
        done = subprocess.run(
            ["/bin/sh", "-c", line.replace("/opt/enginehouse", str(environment))],
            cwd=source, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\nfailed; does pip reach a package index?\n{done.stderr}"
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "list", "--format=freeze"]
    installed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout.lower().split()
    names = {line.partition("==")[0] for line in installed}
    assert {"enginehouse", "grpcio", "tokenizers", "jinja2"} <= names
    assert not {"torch", "numpy", "transformers", "pip", "setuptools", "pytest"} & names
    pinned = {line.lower() for line in (ROOT / "constraints.txt").read_text().split()}
    assert [line for line in installed if not line.startswith("enginehouse==") and line not in pinned] == []

    found, each = image("gateway"), UP["gateway"]
    python = str(environment / "bin" / "python")
    command = [re.sub(r"^--metrics-port=.*", "--metrics-port=0", option) for option in each.command]
    arguments = ["--host", "127.0.0.1", "--port", "0", *command]
    process = subprocess.Popen(
        [python, *found.entrypoint[1:3], *arguments],
        cwd=tmp_path, env=dict(each.environment), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        assert "metrics on" in process.stdout.readline()
        address = process.stdout.readline().split()[-1]
        probe = [python, *found.health[1:3], address, *found.health[4:]]
        assert subprocess.run(probe, cwd=tmp_path, env=dict(each.environment), timeout=60).returncode == 0
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
