"""What an engine needs of a node, and whether a node has it: decided before a byte of the engine is downloaded."""

import shlex

import msgspec

from engine.errors import FailedPrecondition
from engine.opset import OPSET_VERSION


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine was built for; None means that any will do.

    Attributes:
        backend: "torch": a program that the executor interprets; "tensorrt" or "tensorrt_rtx": a plan of one version of it.
        device: "cpu" or "cuda".
        opset_version: of the operator set that the program uses; a node with a later one will do.
        compute_capability: of an NVIDIA GPU, such as "9.0".
        backend_version: of a backend whose plans fit one version only.
        driver_floor: the oldest NVIDIA driver, such as "580.65".
    """

    backend: str
    device: str
    opset_version: int = OPSET_VERSION
    compute_capability: str | None = None
    backend_version: str | None = None
    driver_floor: str | None = None


class Node(msgspec.Struct, frozen=True):
    """What an executor's node has."""

    device: str
    backends: dict[str, str]  # name -> version
    opset_version: int = OPSET_VERSION
    compute_capability: str | None = None
    driver: str | None = None


def mismatches(needs: Fingerprint, node: Node) -> list[str]:
    """In words, each thing that the engine needs and the node has not; empty when the engine can run here."""
    found = []
    if needs.backend not in node.backends:
        found.append(f"it needs backend {needs.backend!r}, this node has {', '.join(sorted(node.backends))}")
    elif needs.backend_version not in (None, node.backends[needs.backend]):
        found.append(f"it needs {needs.backend} {needs.backend_version}, this node has {node.backends[needs.backend]}")
    if needs.device != node.device:
        found.append(f"it needs device {needs.device!r}, this executor runs on {node.device!r}")
    if needs.opset_version > node.opset_version:
        found.append(
            f"it needs operator set {needs.opset_version}, this executor has {node.opset_version} and takes engines of its "
            "own or an older release"
        )
    if needs.compute_capability not in (None, node.compute_capability):
        here = f"this GPU has {node.compute_capability}" if node.compute_capability else "this node has no NVIDIA GPU"
        found.append(f"it needs compute capability {needs.compute_capability}, {here}")
    if needs.driver_floor and _version(node.driver) < _version(needs.driver_floor):
        found.append(f"it needs NVIDIA driver {needs.driver_floor} or newer, this node has {node.driver}")
    return found


def check(
    engine_id: str, source: str, needs: Fingerprint, node: Node, store: str = "", *, dummy_weights: bool = False
) -> None:
    """Raises FailedPrecondition that says what the engine needs, what the node has and which build would fit.

    Args:
        source: the checkpoint that the engine was built of.
        store: the URL of the store that the node loads from.
        dummy_weights: whether the engine has them.
    """
    found = mismatches(needs, node)
    if found:
        command = ["enginehouse", "build", source, "--device", node.device, *(["--store", store] if store else [])]
        command += ["--dummy-weights"] if dummy_weights else []
        raise FailedPrecondition(
            f"engine {engine_id[:12]} cannot run here: {'; '.join(found)}. Build one that fits: {shlex.join(command)}",
            reason="ENGINE_FINGERPRINT_MISMATCH",
            metadata={"engine_id": engine_id},
        )


def _version(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or "0").split(".") if part.isdigit())
