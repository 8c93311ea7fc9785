"""Model families, a page each: how a Hugging Face config becomes a DecoderConfig, and what its weights are called.

A page is a module here with
    ARCHITECTURES   the names in config.json's "architectures" that it reads
    CLASS_NAME      the class that reads its models, `enginehouse.<CLASS_NAME>`; pages may share one
    decoder_config(config: Fields, architecture: str) -> DecoderConfig
    NAMES: Names    what its checkpoints call their weights
A module that is put here is found; nothing else has to change.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Protocol

from builder_svc.models.config import DecoderConfig
from builder_svc.models.fields import Fields
from builder_svc.models.sources import Names
from engine.errors import Unimplemented


class Family(Protocol):
    """What a page provides."""

    ARCHITECTURES: tuple[str, ...]
    CLASS_NAME: str
    NAMES: Names

    def decoder_config(self, config: Fields, architecture: str) -> DecoderConfig:
        """The decoder of a config.json."""


def families() -> Mapping[str, Family]:
    """Architecture -> page, of every page there is."""
    pages = [importlib.import_module(f"{__name__}.{page.name}") for page in pkgutil.iter_modules(__path__)]
    return {architecture: page for page in pages for architecture in page.ARCHITECTURES}


def find_family(config: Fields) -> tuple[Family, str]:
    """The page that reads this config, and the architecture's name.

    Raises:
        InvalidArgument: no architecture is named.
        Unimplemented: none of them is supported; the message lists those that are.
    """
    names = list(map(str, config.require("architectures", list)))
    known = families()
    for name in names:
        if name in known:
            return known[name], name
    raise Unimplemented(
        f"{config.where}: architecture {', '.join(names)} is not supported; supported are {', '.join(sorted(known))}",
        reason="ARCHITECTURE_UNSUPPORTED",
    )
