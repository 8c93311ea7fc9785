"""Starts the containers of the chart's pods as processes: by the command, the variables and the mounts of the manifest.

Only names, ports and paths are other ones; `Node.here` has the whole list.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import urllib3

from protos.probe import probe
from tests.chart import Pod
from tests.deployment import ROOT
from tests.integration import services as processes

ONLY = Path(processes.__file__).parent / "only_extra"


class Node:
    """A machine that runs pods.

    Attributes:
        running: the processes, by the pod's name.

    Args:
        directory: for what is written.
        secrets: each secret's keys and values.
        names: the addresses of other pods, by the names that a pod's command has for them.
    """

    def __init__(self, directory: Path, secrets: Mapping[str, Mapping[str, str]]) -> None:
        self.directory = directory
        self.running: dict[str, processes.Service] = {}
        self.names: dict[str, str] = {}
        self._secrets = secrets
        for name, contents in secrets.items():
            (directory / "secrets" / name).mkdir(parents=True)
            for key, value in contents.items():
                (directory / "secrets" / name / key).write_text(value)

    def here(self, pod: Pod, text: str) -> str:
        """A text of a manifest as it must be on this machine: paths of mounts, names of pods, and the address to listen on."""
        replaced = {"0.0.0.0": "127.0.0.1", **self.names}  # noqa: S104
        replaced |= {place: str(self.directory / "secrets" / name) for name, place in pod.mounted_secrets()}
        for mount in pod.container["volumeMounts"]:
            path = mount["mountPath"]
            replaced.setdefault(path, str(ROOT / "examples" if path == "/checkpoints" else self.directory / path[1:]))
        pattern = "|".join(map(re.escape, sorted(replaced, key=len, reverse=True)))
        return re.sub(rf"(?<![\w.-])(?:{pattern})(?![\w-])", lambda match: replaced[match[0]], text)

    def environment(self, pod: Pod) -> dict[str, str]:
        """The image's and the manifest's variables, and nothing else."""
        home = self.directory / pod.name
        home.mkdir(exist_ok=True)
        own = {key: self.here(pod, value) for key, value in pod.environment(self._secrets).items()}
        return {**own, "PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}

    @contextlib.contextmanager
    def start(
        self, pod: Pod, *more: str, name: str = "", environment: Mapping[str, str] | None = None
    ) -> Iterator[processes.Service]:
        """Runs the pod's container: the image's entry point, then the manifest's arguments. It stops as the node stops it.

        Args:
            more: options that only this machine needs.
            name: instead of the pod's, where several are of one template.
            environment: what a controller adds.
        """
        for mount in pod.container["volumeMounts"]:
            if not mount.get("readOnly"):
                (self.directory / mount["mountPath"][1:]).mkdir(parents=True, exist_ok=True)
        python, *program = pod.image.entrypoint
        assert python == "python"
        given = [re.sub(r"^--metrics-port=\d+$", "--metrics-port=0", part) for part in pod.container["args"]]
        started = processes.service(
            program[1],
            self.directory / f"{name or pod.name}.log",
            *(self.here(pod, part) for part in (*program[2:], *given)),
            *more,
            program=program[:2],
            environment={**self.environment(pod), **(environment or {})},
            alone=True,
        )
        with started as running:
            self.running[name or pod.name] = running
            assert b"enginehouse_" in urllib3.request("GET", running.metrics).data
            yield running

    def stop(self, pod: Pod) -> None:
        """As the node stops a pod; fails if it takes longer than its grace."""
        running = self.running[pod.name]
        running.process.send_signal(signal.Signals[pod.image.stop_signal])
        assert running.process.wait(pod.spec["terminationGracePeriodSeconds"]) == 0, running.log.read_text()
        assert "Traceback" not in running.log.read_text()

    def passes(self, pod: Pod, kind: str, name: str = "") -> bool:
        """Whether one of its probes, such as "readinessProbe", passes."""
        asked: dict[str, Any] = pod.container[kind]
        address = self.running[name or pod.name].address
        if "grpc" in asked:
            assert asked["grpc"]["port"] == pod.ports["grpc"]
            return probe(address, asked["grpc"]["service"], asked["timeoutSeconds"]) == "SERVING"
        inside = f"127.0.0.1:{pod.ports['grpc']}"
        python, *command = (part.replace(inside, address) for part in asked["exec"]["command"])
        assert python == "python"
        only = {"PYTHONPATH": f"{ONLY}{os.pathsep}{ROOT}", "ENGINEHOUSE_ONLY": pod.service}
        done = subprocess.run(
            [sys.executable, *command],
            env={**self.environment(pod), **only},
            capture_output=True,
            text=True,
            timeout=asked["timeoutSeconds"] + 55,  # a busy machine is no matter here
        )
        assert (done.returncode == 0) == (done.stdout == "SERVING\n"), done.stdout + done.stderr
        return done.returncode == 0
