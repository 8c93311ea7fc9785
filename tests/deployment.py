"""What docker-compose.yml and deploy/docker/Dockerfile say, as a test needs it: no Docker is asked."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import dockerfile
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"
README = (ROOT / "deploy" / "docker" / "README.md").read_text()

_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")


@dataclass(frozen=True)
class Stage:
    """A stage of the Dockerfile: its own instructions, without those of the stage that it goes on from."""

    name: str
    base: str
    commands: tuple[dockerfile.Command, ...]


@dataclass(frozen=True)
class Image:
    """What a target becomes.

    Attributes:
        extra: of pyproject.toml, that its environment was made with; several with commas between.
        commands: all instructions, from the base image on.
        health: the command of its health check.
    """

    extra: str
    commands: tuple[dockerfile.Command, ...]
    entrypoint: tuple[str, ...]
    environment: Mapping[str, str]
    labels: Mapping[str, str]
    user: str
    health: tuple[str, ...]
    exposed: tuple[int, ...]
    volumes: tuple[str, ...]
    stop_signal: str


@dataclass(frozen=True)
class Service:
    """A service of docker-compose.yml, as Compose would start it.

    Attributes:
        target: of the Dockerfile; empty for an image of others.
        command: behind the image's entry point.
        environment: the image's and the file's.
        ports: (address, port) that is published, and the container's port.
        definition: everything else, as the file has it.
    """

    name: str
    target: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ports: tuple[tuple[str, int, int], ...]
    definition: Mapping[str, Any]

    @property
    def image(self) -> Image:
        """Of a service of ours."""
        return image(self.target)

    @property
    def package(self) -> str:
        """The Python package that is run."""
        return self.image.entrypoint[self.image.entrypoint.index("-m") + 1]


def stages() -> dict[str, Stage]:
    """All of them, by name, in their order."""
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    name, base, commands = "", "", []
    for command in dockerfile.parse_file(str(DOCKERFILE)):
        if command.cmd == "ARG" and not name:
            key, _, value = command.value[0].partition("=")
            arguments[key] = value
        elif command.cmd == "FROM":
            if name:
                found[name] = Stage(name, base, tuple(commands))
            base, _, name = command.value
            base, commands = _fill(base, arguments), []
        else:
            commands.append(command)
    return {**found, name: Stage(name, base, tuple(commands))}


def image(target: str) -> Image:
    """What a target becomes. Raises KeyError if there is no such stage."""
    commands = chain(target)
    copied = [flag for command in commands for flag in command.flags if flag.startswith("--from=")]
    source = chain(copied[-1].removeprefix("--from="))
    extras = re.findall(r"\.\[([\w,]+)\]", " ".join(part for command in source for part in command.value))
    return Image(
        extra=extras[-1],
        commands=commands,
        entrypoint=_last(commands, "ENTRYPOINT"),
        environment=_pairs(commands, "ENV"),
        labels=_pairs(commands, "LABEL"),
        user="".join(_last(commands, "USER")),
        health=_last(commands, "HEALTHCHECK")[1:],
        exposed=tuple(int(port) for command in commands if command.cmd == "EXPOSE" for port in command.value),
        volumes=tuple(path for command in commands if command.cmd == "VOLUME" for path in command.value),
        stop_signal="".join(_last(commands, "STOPSIGNAL")),
    )


def chain(name: str) -> tuple[dockerfile.Command, ...]:
    """A stage's instructions behind those of all stages that it goes on from."""
    known = stages()
    stage = known[name]
    return (*(chain(stage.base) if stage.base in known else ()), *stage.commands)


def compose(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """docker-compose.yml with its variables filled in: from `environment`, else their defaults."""
    text = "\n".join(line for line in COMPOSE.read_text().splitlines() if not line.strip().startswith("#"))
    loaded: dict[str, Any] = yaml.safe_load(_fill(text, environment or {}))
    return loaded


def variables(text: str) -> dict[str, str]:
    """The names of ${NAME:-default} in a text, and their defaults."""
    return {match[1]: match[2] or "" for match in _VARIABLE.finditer(text)}


def services(environment: Mapping[str, str] | None = None) -> dict[str, Service]:
    """All services, by name.

    Args:
        environment: what .env and the caller's environment would have: for ${NAME}, and for what is passed on without a value.
    """
    given = environment or {}
    return {name: service(name, each, given) for name, each in compose(given)["services"].items()}


def service(name: str, definition: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Service:
    """One service, from its entry under `services`."""
    target = definition.get("build", {}).get("target", "")
    named = definition.get("environment", {}).items()
    values = {key: (environment or {}).get(key) if value is None else str(value) for key, value in named}
    set_here = {key: value for key, value in values.items() if value is not None}
    ports = [each.split(":") for each in definition.get("ports", ())]
    return Service(
        name=name,
        target=target,
        command=tuple(definition.get("command", ())),
        environment={**(image(target).environment if target else {}), **set_here},
        ports=tuple((address, int(outside), int(inside)) for address, outside, inside in ports),
        definition=definition,
    )


def context() -> list[Path]:
    """The files that .dockerignore lets into the build's context."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    kept = {line[1:] for line in lines if line.startswith("!")}
    dropped = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    if lines[0] != "*" or any("/" in name for name in (*kept, *dropped)):
        raise ValueError(".dockerignore: only `*`, `!NAME` and `**/PATTERN` are understood here")
    found = []
    for top in sorted(ROOT / name for name in kept):
        for directory, _, files in os.walk(top) if top.is_dir() else [(str(ROOT), [], [top.name])]:
            found += [Path(directory, name) for name in files if Path(directory, name).exists()]
    return [
        path
        for path in found
        if not any(fnmatch(part, pattern) for part in path.relative_to(ROOT).parts for pattern in dropped)
    ]


def seconds(time: str) -> float:
    """A duration such as 30s or 15m."""
    return float(time[:-1]) * {"s": 1, "m": 60, "h": 3600}[time[-1]]


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: values.get(match[1], match[2] or ""), text)


def _last(commands: tuple[dockerfile.Command, ...], kind: str) -> tuple[str, ...]:
    return next((command.value for command in reversed(commands) if command.cmd == kind), ())


def _pairs(commands: tuple[dockerfile.Command, ...], kind: str) -> dict[str, str]:
    found: dict[str, str] = {}
    arguments: dict[str, str] = {}
    for command in commands:
        if command.cmd == "ARG":
            key, _, value = command.value[0].partition("=")
            arguments[key] = value
        elif command.cmd == kind:
            for key, value in zip(command.value[::2], command.value[1::2], strict=True):
                found[key] = _fill(value.strip('"'), arguments)
    return found
