"""The chart's examples without a cluster: each container by what the rendered manifest says of it, with the real services."""

import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from enginehouse import LLM, SamplingParams, key_file
from enginehouse.certificates import generate
from enginehouse.cli import main
from enginehouse.cluster import hold_ports
from protos.v1.executor_pb2 import ENGINE_STATE_READY, GetStatusRequest
from protos.v1.executor_pb2_grpc import ExecutorStub
from tests.chart import RELEASE, helm, pods, render, values
from tests.deployment import ROOT
from tests.documents import commands
from tests.integration.pods import Node
from tests.integration.services import Service

PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
NAME = f"{RELEASE}-enginehouse-"

pytestmark = pytest.mark.skipif(
    not (ROOT / "examples" / "demo-model" / "model.safetensors").exists(), reason="the demo checkpoint is not there"
)


def type_in(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.output


def test_a_cluster_on_one_node_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    started = pods(render("one-node"))
    node, told = Node(tmp_path, {}), {}
    with ExitStack() as stack:

        def start(name: str) -> None:
            stack.enter_context(node.start(started[name]))
            assert all(node.passes(started[name], probe) for probe in PROBES), name

        start("builder")
        for command in map(shlex.split, commands("kubernetes.md")):
            assert command[0] == "enginehouse"
            if command[1] == "models":  # what they load is built by now
                start("demo")
                node.names[f"{NAME}demo-0.{NAME}demo.default.svc:8411"] = node.running["demo"].address
                start("gateway")
            for name, port in (("builder", 8401), ("gateway", 8400)):
                here = node.running[name].address if name in node.running else ""
                command = [part.replace(f"127.0.0.1:{port}", here) for part in command]
            greedy = ("--temperature", "0") if command[1] == "generate" else ()  # a sampled text may end at once
            told[command[1]] = type_in(*command[1:], *greedy)
        assert list(told) == ["build", "models", "generate"] and "demo" in told["models"] and told["generate"].strip()
        for name in ("gateway", "demo", "builder"):
            node.stop(started[name])
            assert not any(node.passes(started[name], probe) for probe in PROBES)
    for log in tmp_path.glob("*.log"):
        assert all(json.loads(line)["level"] for line in log.read_text().splitlines()), "ENGINEHOUSE_LOG_FORMAT"


@pytest.mark.drill
def test_tls_api_keys_and_signatures_from_secrets(tmp_path: Path) -> None:
    """`several-models`, whose store is a directory here, since tests/integration/test_compose.py has the one in S3."""
    certs, tenants = tmp_path / "certs", tmp_path / "tenants.json"
    generate(certs, ["127.0.0.1"])
    key = key_file.add(tenants, "somebody").secret
    type_in("keys", "generate", str(tmp_path / "signing.pem"))
    public = type_in("keys", "show", str(tmp_path / "signing.pem"))

    def pair(service: str) -> dict[str, str]:
        files = {"tls.crt": f"{service}.pem", "tls.key": f"{service}-key.pem", "ca.crt": "ca.pem"}
        return {name: (certs / file).read_text() for name, file in files.items()}

    secrets = {f"{service}-tls": pair(service) for service in ("gateway", "builder", "executor")}
    secrets["tenants"] = {"api-keys.json": tenants.read_text()}
    secrets["signing"] = {"key.pem": (tmp_path / "signing.pem").read_text()}
    secrets["trusted-keys"] = {"ours.pem": public}
    secrets["engines-store"] = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "asks"}
    given = values(
        store__url="/srv/engines", store__claim="engines", builder__signingKey__secret="signing", builder__gpus=0
    )
    started = pods(render("several-models", *given))
    node = Node(tmp_path, secrets)
    client = {"tls_ca": certs / "ca.pem", "tls_cert": certs / "client.pem", "tls_key": certs / "client-key.pem"}
    as_client = [part for name, path in client.items() for part in (f"--{name.replace('_', '-')}", str(path))]
    with ExitStack() as stack:
        builder = stack.enter_context(node.start(started["builder"]))
        type_in(
            *as_client, "build", str(ROOT / "examples" / "demo-model"), "--name", "demo", "--builder", builder.address
        )
        executor = stack.enter_context(node.start(started["embedded"]))
        node.names[f"{NAME}embedded-0.{NAME}embedded.default.svc:8411"] = executor.address
        node.names |= {
            f"{NAME}{pool}-{number}.{NAME}{pool}.default.svc:8411": "127.0.0.1:1"
            for pool in ("large", "small")
            for number in range(8)
        }
        gateway = stack.enter_context(node.start(started["gateway"]))
        for name in node.running:
            assert node.passes(started[name], "readinessProbe"), name
        with LLM.connect(gateway.address, "demo", api_key=key, tls_ca=str(client["tls_ca"])) as llm:
            assert llm.generate("In the beginning", SamplingParams(max_tokens=4)).outputs[0].length == 4


@pytest.mark.drill
def test_a_pool_of_several_machines_finds_itself(tmp_path: Path) -> None:
    """The pool `large` on the CPU: two pods of one template, and what the controller of a LeaderWorkerSet adds."""
    given = {"device": "cpu", "gpus": 0, "engines": ["demo"], "env": {}, "startMinutes": 1}
    plain = {"tls__executor": {"secret": ""}, "executorDefaults__trustedKeys": {"secret": ""}}
    large = pods(
        render("several-models", *values(executors__large=given, store__url="/srv/engines", store__claim="x", **plain))
    )["large"]
    node = Node(tmp_path, {"engines-store": {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "asks"}})
    (tmp_path / "srv").mkdir()
    place = ("--store", str(tmp_path / "srv" / "engines"))
    type_in(
        "build", str(ROOT / "examples" / "demo-model"), "--name", "demo", "--tp", "2", "--max-seq-len", "128", *place
    )
    (held,) = hold_ports(1)
    group = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "127.0.0.1"}
    here = ("--machines-port", str(held.getsockname()[1]))
    with held, ExitStack() as stack:

        def start(index: int) -> Service:
            environment = {**group, "LWS_WORKER_INDEX": str(index)}
            return stack.enter_context(node.start(large, *here, name=f"large-{index}", environment=environment))

        with ThreadPoolExecutor() as both:
            leader, _ = both.map(start, (0, 1))
        assert all(node.passes(large, probe, f"large-{index}") for probe in PROBES for index in (0, 1))
        with grpc.insecure_channel(leader.address) as channel:
            (engine,) = ExecutorStub(channel).GetStatus(GetStatusRequest()).engines
        assert engine.state == ENGINE_STATE_READY


def test_the_pages_commands_for_helm_and_its_files(tmp_path: Path) -> None:
    """`helm install` as far as it goes without a cluster: what it would send is rendered."""
    for command in commands("kubernetes.md", needs="a cluster"):
        program, *arguments = shlex.split(command)
        files = [part for part in arguments if part.startswith("deploy/")]
        assert all((ROOT / part).exists() for part in files)
        if program == "helm":
            verb, release, chart, *options = arguments
            assert (verb, release) == ("install", RELEASE)
            text = helm(
                "template", release, *(str(ROOT / part) if part in files else part for part in (chart, *options))
            )
            assert f"name: {NAME}gateway" in text
        else:
            assert program == "kubectl"
            for what in (part for part in arguments if "/" in part and part not in files):
                kind, name = what.split("/")
                found = {(each["kind"].lower(), each["metadata"]["name"]) for each in render("one-node")}
                assert (kind, name) in found
