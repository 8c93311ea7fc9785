"""What the machine of an executor has, for engines to be held against."""

import logging

import torch

from engine import tensorrt
from engine.errors import FailedPrecondition
from engine.fingerprint import Node

log = logging.getLogger(__name__)


def this_node(device: str) -> Node:
    """What this machine has. Raises FailedPrecondition for a device that is not there."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise FailedPrecondition(
                "this executor was started with --device cuda, but torch finds no GPU here", reason="DEVICE_MISSING"
            )
        major, minor = torch.cuda.get_device_capability()
        return Node("cuda", _backends(), compute_capability=f"{major}.{minor}")
    return Node("cpu", {"torch": torch.__version__})


def _backends() -> dict[str, str]:
    """By name, the version of each backend that a GPU's engines may be for."""
    found = {"torch": torch.__version__}
    for flavour in tensorrt.installed():
        try:
            found[flavour] = tensorrt.version(tensorrt.load(flavour))
        except FailedPrecondition as error:
            log.warning("%s", error)
    return found
