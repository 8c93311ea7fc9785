"""What the Helm chart renders, as a test needs it: by Helm itself; no cluster is asked."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.deployment import ROOT, Image, image

CHART = ROOT / "deploy" / "helm" / "enginehouse"
VOLUME = "volume.yaml"  # no values: what one of the examples needs
EXAMPLES = tuple(sorted(path.stem for path in (CHART / "examples").glob("*.yaml") if path.name != VOLUME))
RELEASE = "house"
HELM = Path(sys.executable).parent / "helm"
TEMPLATED = {"Deployment", "StatefulSet", "LeaderWorkerSet"}

Manifest = dict[str, Any]


class ChartError(Exception):
    """Helm refuses the values, and says why."""


@dataclass(frozen=True)
class Pod:
    """A pod of a Deployment, a StatefulSet or a LeaderWorkerSet; it has one container.

    Attributes:
        owner: the whole manifest.
        template: the pod's.
        container: as the template has it.
    """

    owner: Manifest
    template: Manifest
    container: Manifest

    @property
    def name(self) -> str:
        """Of the owner, without the release's."""
        return str(self.owner["metadata"]["name"]).removeprefix(f"{RELEASE}-enginehouse-")

    @property
    def service(self) -> str:
        """ "gateway", "builder" or "executor"."""
        return str(self.container["name"])

    @property
    def image(self) -> Image:
        """What the Dockerfile makes under the name of the container's."""
        return image(self.target)

    @property
    def target(self) -> str:
        """Of the Dockerfile."""
        return str(self.container["image"]).rpartition("/")[2].partition(":")[0].removeprefix("enginehouse-")

    @property
    def ports(self) -> dict[str, int]:
        """By name."""
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def environment(self, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """The image's and its own variables, with what secrets of these names hold under their keys."""
        found = dict(self.image.environment)
        for each in self.container["env"]:
            source = each.get("valueFrom", {})
            if "secretKeyRef" in source:
                found[each["name"]] = secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
            elif "resourceFieldRef" in source:
                kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
                found[each["name"]] = self.container["resources"][kind][resource]
            else:
                found[each["name"]] = each["value"]
        return found

    def mounted_secrets(self) -> Iterator[tuple[str, str]]:
        """Each secret that is mounted, and where."""
        names = {
            volume["name"]: volume["secret"]["secretName"] for volume in self.spec["volumes"] if "secret" in volume
        }
        for mount in self.container["volumeMounts"]:
            if mount["name"] in names:
                yield names[mount["name"]], mount["mountPath"]

    @property
    def spec(self) -> Manifest:
        """Of the pod."""
        return dict(self.template["spec"])


def helm(*arguments: str) -> str:
    """Runs it; what it prints. Raises ChartError."""
    done = subprocess.run([HELM, *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ChartError(done.stdout + done.stderr)
    return done.stdout


@cache
def render(example: str, *options: str) -> tuple[Manifest, ...]:
    """All manifests of one of `EXAMPLES`, with further options of Helm's. Raises ChartError."""
    text = helm("template", RELEASE, str(CHART), "--values", str(CHART / "examples" / f"{example}.yaml"), *options)
    return tuple(manifest for manifest in yaml.safe_load_all(text) if manifest)


def values(**given: object) -> list[str]:
    """Options that set values; dots are `__`."""
    return [
        part
        for name, value in given.items()
        for part in ("--set-json", f"{name.replace('__', '.')}={json.dumps(value)}")
    ]


def of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    """Those."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pods(manifests: Sequence[Manifest]) -> dict[str, Pod]:
    """Of all that have a template, by the owner's name without the release's."""
    found = {}
    for manifest in manifests:
        if manifest["kind"] in TEMPLATED:
            spec = manifest["spec"]
            template = spec.get("template") or spec["leaderWorkerTemplate"]["workerTemplate"]
            (container,) = template["spec"]["containers"]
            pod = Pod(manifest, template, container)
            found[pod.name] = pod
    return found
