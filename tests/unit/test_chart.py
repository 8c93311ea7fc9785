"""The Helm chart: rendered by Helm, checked against the APIs' schemas and against what code, images and monitoring say."""

import argparse
import json
import re
import tomllib
from itertools import product
from typing import Any

import kubernetes_validate
import pytest
import yaml

from protos.access import Access
from protos.options import add_options
from protos.rpc import ALIVE
from tests import promql
from tests.chart import CHART, EXAMPLES, RELEASE, ChartError, Manifest, helm, of_kind, pods, render, values
from tests.deployment import ROOT

KUBERNETES = ("1.30", "1.37")  # the first that the chart takes, and the newest
OTHERS = {
    "LeaderWorkerSet",
    "ServiceMonitor",
    "PrometheusRule",
    "ScaledObject",
}  # kinds that others than Kubernetes define
POOLS = [(example, name) for example in EXAMPLES for name in pods(render(example))]


def named(manifests: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in of_kind(manifests, kind)}


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


# What Kubernetes says


@pytest.mark.parametrize("example", EXAMPLES)
def test_helm_finds_nothing_to_say(example: str) -> None:
    said = helm("lint", "--strict", str(CHART), "--values", str(CHART / "examples" / f"{example}.yaml"))
    assert "0 chart(s) failed" in said and "[WARNING]" not in said


@pytest.mark.parametrize(("example", "version"), list(product(EXAMPLES, KUBERNETES)))
def test_manifests_follow_the_schemas_of_the_api(example: str, version: str) -> None:
    manifests = render(example)
    checked = [each for each in manifests if each["kind"] not in OTHERS]
    assert len(checked) > 8
    for manifest in checked:
        kubernetes_validate.validate(manifest, version, strict=True)
    for pod in pods(manifests).values():  # those of a LeaderWorkerSet, too
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod.spec}
        kubernetes_validate.validate(as_pod, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_what_no_example_has_follows_them_too(version: str) -> None:
    given = values(
        gateway__httpPort=8080, gateway__service={"type": "Headless", "annotations": {"a": "b"}}, serviceAccount="engines",
        gateway__env={"A": 1, "B": {"fieldRef": {"fieldPath": "metadata.name"}}}, gateway__affinity={"podAntiAffinity": {}},
        builder__checkpoints__claim="checkpoints", builder__runtimeClassName="nvidia", store__claim="engines", store__url="/srv",
        apiKeys={"executor": {"secret": "keys"}, "ofGateway": {"secret": "key"}, "builder": {"secret": "keys"}},
        executors__small__maxUnavailable="25%",
    )  # fmt: skip
    manifests = render("several-models", *given)
    for manifest in manifests:
        if manifest["kind"] not in OTHERS:
            kubernetes_validate.validate(manifest, version, strict=True)
    gateway = pods(manifests)["gateway"]
    assert dict(gateway.mounted_secrets())["key"] == "/etc/enginehouse/executor-key"
    assert "ENGINEHOUSE_EXECUTOR_API_KEY_FILE" in {each["name"] for each in gateway.container["env"]}
    assert "--insecure" not in pods(manifests)["small"].container["args"]


def test_the_schemas_refuse_what_is_wrong() -> None:
    wrong: Any = json.loads(json.dumps(named(render("one-node"), "Deployment")[f"{RELEASE}-enginehouse-gateway"]))
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    for version in KUBERNETES:
        with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
            kubernetes_validate.validate(wrong, version, strict=True)


def test_kinds_of_others_have_the_fields_that_these_define() -> None:
    manifests = render("several-models")
    (group,) = of_kind(manifests, "LeaderWorkerSet")
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert group["spec"].keys() == {"replicas", "startupPolicy", "networkConfig", "leaderWorkerTemplate"}
    inner = group["spec"]["leaderWorkerTemplate"]
    assert inner.keys() == {"size", "restartPolicy", "workerTemplate"} and inner["size"] == 2
    (scaled,) = of_kind(manifests, "ScaledObject")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "triggers"} <= scaled["spec"].keys()
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert {each["apiVersion"] for each in of_kind(manifests, kind)} == {"monitoring.coreos.com/v1"}
    assert {each["kind"] for example in EXAMPLES for each in render(example)} >= OTHERS


# What can be set


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gateway__replica": 2}, "replica is not allowed"),
        ({"gateway__replicas": "two"}, "Invalid type"),
        ({"gateway__httpPort": 70000}, "httpPort"),
        ({"executors__Big": {}}, "executors"),
        ({"executors__gateway": {}}, "executors"),
        ({"executors__demo__device": "tpu"}, "device"),
        ({"executors__demo__extraArgs": ["--port=1"]}, "extraArgs"),
        ({"store__url": "engines"}, "store.url"),
        ({"store__url": ""}, "where are the engines"),
        ({"executors__demo__autoscaling__by": "keda"}, "which Prometheus is asked"),
        ({"networkPolicy__enabled": False}, "everybody on the cluster's network could command the"),
        ({"tls__executor": {"secret": "x", "mutual": True}}, "want a certificate of the gateway"),
        ({"apiKeys__executor__secret": "x"}, "want a key of the gateway"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused_with_a_word(given: dict[str, object], told: str) -> None:
    with pytest.raises(ChartError, match=told):
        render("one-node", *values(**given))


def test_a_chart_without_executors_is_refused() -> None:
    with pytest.raises(ChartError, match="executors"):
        helm("template", RELEASE, str(CHART), "--set", "store.url=s3://engines")


def test_every_value_stands_in_the_file_that_explains_them_and_the_other_way_round() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    text = (CHART / "values.yaml").read_text()
    place = {"affinity", "priorityClassName", "runtimeClassName", "topologySpreadConstraints"}  # named in one comment
    assert all(name in text for name in place)

    def compare(schema: dict[str, Any], given: Any, path: str) -> None:
        schema = schema if "$ref" not in schema else whole["definitions"]["pool"]
        if "properties" not in schema:
            return
        missing = schema["properties"].keys() - given.keys() - place - {"global", "image"}
        if not path.endswith("resources"):
            assert not missing, f"{path}: {missing}"
        assert given.keys() <= schema["properties"].keys(), path
        for name, inner in given.items():
            compare(schema["properties"][name], inner, f"{path}.{name}")

    whole = schema
    compare(schema, yaml.safe_load(text), "")


def test_a_pool_may_say_less_than_the_defaults_do() -> None:
    given = {"tolerations": [], "replicas": 0, "resources": {"limits": {"cpu": "1"}}}
    defaults = {"tolerations": [{"operator": "Exists"}], "nodeSelector": {"pool": "x"}}
    pod = pods(render("one-node", *values(executors__demo=given, executorDefaults=defaults)))["demo"]
    assert "tolerations" not in pod.spec and pod.spec["nodeSelector"] == {"pool": "x"}
    assert pod.owner["spec"]["replicas"] == 0


# What the code and the images say


@pytest.mark.parametrize(("example", "name"), POOLS)
def test_a_pod_has_its_images_ports_user_and_probes(example: str, name: str) -> None:
    pod = pods(render(example))[name]
    ports = pod.ports
    assert pod.image.exposed == (ports["grpc"], ports["metrics"])
    assert {"machines", "grpc", "metrics"} >= ports.keys()
    assert pod.target.endswith("-cuda") == ("nvidia.com/gpu" in pod.container["resources"].get("limits", {}))
    assert f"--metrics-port={ports['metrics']}" in pod.container["args"]
    context = pod.spec["securityContext"]
    assert (context["runAsUser"], context["runAsNonRoot"], pod.spec["automountServiceAccountToken"]) == (
        10001,
        True,
        False,
    )
    own = pod.container["securityContext"]
    assert (
        own["readOnlyRootFilesystem"]
        and own["capabilities"] == {"drop": ["ALL"]}
        and not own["allowPrivilegeEscalation"]
    )
    ready = f"enginehouse.v1.{pod.service.capitalize()}"
    starting = pod.container["startupProbe"]
    minutes = 30 if pod.service == "executor" else 2
    minutes = 60 if name == "large" else minutes
    assert starting["periodSeconds"] * starting["failureThreshold"] == 60 * minutes
    secured = any(variable["name"] == "ENGINEHOUSE_TLS_CERT" for variable in pod.container["env"])
    for kind, health in (("startupProbe", ALIVE), ("livenessProbe", ALIVE), ("readinessProbe", ready)):
        probe = pod.container[kind]
        if secured:
            command = ["python", "-m", "protos.probe", f"127.0.0.1:{ports['grpc']}", "--service", health]
            assert probe["exec"]["command"] == command
        else:
            assert probe["grpc"] == {"port": ports["grpc"], "service": health}


@pytest.mark.parametrize(("example", "name"), POOLS)
def test_a_pod_has_time_for_what_its_service_does_at_the_end(example: str, name: str) -> None:
    pod = pods(render(example))[name]
    drain = sum(
        float(option.partition("=")[2]) for option in pod.container["args"] if option.startswith("--drain-seconds")
    )
    sleeps = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert (drain > 0) == (pod.service != "builder")
    assert pod.spec["terminationGracePeriodSeconds"] >= drain + sleeps + 5


@pytest.mark.parametrize(("example", "name"), POOLS)
def test_services_start_with_what_they_are_told_of_who_may_call(example: str, name: str) -> None:
    """On all addresses, as in a pod; `Access.of` refuses what would let in everybody unasked."""
    pod = pods(render(example))[name]
    parser = argparse.ArgumentParser()
    add_options(parser)
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104
    options, _ = parser.parse_known_args(pod.container["args"])
    variables = {each["name"] for each in pod.container["env"]}
    mutual = "ENGINEHOUSE_TLS_CA" in variables
    assert options.insecure == (pod.service != "gateway" and not mutual)
    if not variables & {"ENGINEHOUSE_TLS_CERT", "ENGINEHOUSE_API_KEYS"}:
        Access.of(pod.service, options)


@pytest.mark.parametrize("example", EXAMPLES)
def test_gateways_name_every_executor_that_a_pool_can_have(example: str) -> None:
    manifests = render(example)
    told = [
        part.partition("=")[2]
        for part in pods(manifests)["gateway"].container["args"]
        if part.startswith("--executor=")
    ]
    wanted = []
    for pod in pods(manifests).values():
        if pod.service == "executor":
            name = pod.owner["metadata"]["name"]
            scalers = [*of_kind(manifests, "HorizontalPodAutoscaler"), *of_kind(manifests, "ScaledObject")]
            most = [
                each["spec"].get("maxReplicas") or each["spec"]["maxReplicaCount"]
                for each in scalers
                if each["spec"]["scaleTargetRef"]
                == {key: pod.owner[key] for key in ("apiVersion", "kind")} | {"name": name}
            ]
            assert ("replicas" in pod.owner["spec"]) == (not most)
            wanted += [
                f"{name}-{number}.{name}.default.svc:8411"
                for number in range(most[0] if most else pod.owner["spec"]["replicas"])
            ]
            if pod.owner["kind"] == "StatefulSet":  # else the controller of the group makes it
                assert named(manifests, "Service")[pod.owner["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"
                assert pod.owner["spec"]["serviceName"] == name
    assert sorted(told) == sorted(wanted) and told


def test_the_chart_has_the_projects_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (chart["appVersion"], chart["version"], chart["description"]) == (
        project["version"],
        project["version"],
        project["description"],
    )


def test_clients_may_balance_among_gateways_themselves() -> None:
    service = named(render("one-node", *values(gateway__service__type="Headless")), "Service")[
        f"{RELEASE}-enginehouse-gateway"
    ]
    assert service["spec"]["clusterIP"] == "None" and "type" not in service["spec"]


def test_the_http_port_is_there_if_it_was_asked_for() -> None:
    without, given = render("one-node"), render("one-node", *values(gateway__httpPort=8080))
    assert not [part for part in pods(without)["gateway"].container["args"] if part.startswith("--http-port")]
    assert "--http-port=8080" in pods(given)["gateway"].container["args"]
    assert pods(given)["gateway"].ports["http"] == 8080
    service = named(given, "Service")[f"{RELEASE}-enginehouse-gateway"]
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]}["http"] == 8080
    policy = named(given, "NetworkPolicy")[f"{RELEASE}-enginehouse-gateway"]
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": "grpc"}, {"port": "http"}]


@pytest.mark.parametrize("example", EXAMPLES)
def test_secrets_come_by_reference_alone(example: str) -> None:
    manifests = render(example)
    assert not of_kind(manifests, "Secret")
    for pod in pods(manifests).values():
        for each in pod.container["env"]:
            if re.search(r"ACCESS_KEY|TOKEN|PASSWORD", each["name"]):
                assert each.keys() == {"name", "valueFrom"}
        mounted = {place for _, place in pod.mounted_secrets()}
        files = [
            each["value"] for each in pod.container["env"] if each.get("value", "").startswith("/etc/enginehouse/")
        ]
        files += [part.partition("=")[2] for part in pod.container["args"] if "=/etc/enginehouse/" in part]
        assert all(any(file.startswith(place) for place in mounted) for file in files)
        read_only = {mount["mountPath"] for mount in pod.container["volumeMounts"] if mount.get("readOnly")}
        assert mounted <= read_only


# What belongs together


@pytest.mark.parametrize("example", EXAMPLES)
def test_selectors_find_their_pods_and_no_others(example: str) -> None:
    manifests = render(example)
    labels = {name: pod.template["metadata"]["labels"] for name, pod in pods(manifests).items()}
    for kind in ("Service", "PodDisruptionBudget"):
        for name, manifest in named(manifests, kind).items():
            selector = manifest["spec"]["selector"]
            selector = dict(selector.get("matchLabels", selector))
            leads = selector.pop("leaderworkerset.sigs.k8s.io/worker-index", None)
            found = [pod for pod in labels if selects(selector, labels[pod])]
            assert found == [name.removeprefix(f"{RELEASE}-enginehouse-").removesuffix("-leaders" if leads else "")]
    assert len(of_kind(manifests, "PodDisruptionBudget")) == len(labels)
    for name, pod in pods(manifests).items():
        if "selector" in pod.owner["spec"]:
            assert selects(pod.owner["spec"]["selector"]["matchLabels"], labels[name])


def test_executors_are_reached_by_gateways_operators_and_their_own_group_alone() -> None:
    manifests = render("several-models")
    labels = {name: pod.template["metadata"]["labels"] for name, pod in pods(manifests).items()}
    policies = named(manifests, "NetworkPolicy")
    prefix = f"{RELEASE}-enginehouse-"
    assert policies.keys() == {f"{prefix}{name}" for name in ("gateway", "builder", "executor", "large")}
    calls, scrapes = policies[f"{prefix}executor"]["spec"]["ingress"]
    peers = calls["from"]
    assert [name for name in labels if selects(peers[0]["podSelector"]["matchLabels"], labels[name])] == ["gateway"]
    assert peers[1:] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "operators"}}}]
    assert calls["ports"] == [{"port": "grpc"}] and scrapes["ports"] == [{"port": "metrics"}]
    group = policies[f"{prefix}large"]["spec"]
    (peer,) = group["ingress"][0]["from"]
    for selector in (group["podSelector"], peer["podSelector"]):
        assert [name for name in labels if selects(selector["matchLabels"], labels[name])] == ["large"]
    (builder,) = named(render("one-node"), "NetworkPolicy")[f"{prefix}builder"]["spec"].get("ingress") or [None]
    assert builder is None, "nobody is let in unless somebody is named"


def test_every_metrics_port_is_scraped_under_the_name_that_alerts_go_by() -> None:
    config = yaml.safe_load((promql.DEPLOY / "prometheus" / "prometheus.yml").read_text())
    manifests = render("several-models")
    services = of_kind(manifests, "Service")
    monitors = of_kind(manifests, "ServiceMonitor")
    jobs = set()
    for service in services:
        labels = service["metadata"]["labels"]
        scraping = [each for each in monitors if selects(each["spec"]["selector"]["matchLabels"], labels)]
        assert len(scraping) == 1
        jobs.add(labels[scraping[0]["spec"]["jobLabel"]])
        assert scraping[0]["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert jobs == {job["job_name"] for job in config["scrape_configs"]}


def test_alerts_and_dashboard_are_those_of_the_repository() -> None:
    (rule,) = of_kind(render("gpu-pool", *values(executors__qwen__autoscaling__by="none")), "PrometheusRule")
    assert rule["spec"]["groups"] == yaml.safe_load(promql.ALERTS.read_text())["groups"]
    (scaled,) = of_kind(render("gpu-pool"), "PrometheusRule")
    left = {each["alert"] for each in promql.alerts()} - {
        each["alert"] for each in scaled["spec"]["groups"][0]["rules"]
    }
    assert left == {"ExecutorUnreachable"}, "executors that a pool could have and has not"
    (dashboard,) = of_kind(render("gpu-pool"), "ConfigMap")
    assert json.loads(dashboard["data"]["enginehouse.json"]) == json.loads(promql.DASHBOARD.read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_pools_scale_on_a_metric_that_executors_have() -> None:
    (scaler,) = [
        each for each in of_kind(render("gpu-pool"), "HorizontalPodAutoscaler") if "qwen" in each["metadata"]["name"]
    ]
    metric = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    (scaled,) = of_kind(render("several-models"), "ScaledObject")
    (selector,) = promql.selectors(scaled["spec"]["triggers"][0]["metadata"]["query"])
    assert selector.metric == metric
    assert f'"{metric.removeprefix("enginehouse_")}"' in (ROOT / "executor_svc" / "telemetry.py").read_text()
