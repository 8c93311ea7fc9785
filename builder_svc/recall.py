"""Which engine a build has given, so that the same build need not read the checkpoint, or import torch, to find it again.

A shortcut only: the engine id stays what decides. What tells a checkpoint from its next version are its files' names, inodes,
sizes and times of change, as in `checkpoint/digests.py`.
"""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from builder_svc.build_config import RECIPE_VERSION, BuildConfig
from builder_svc.checkpoint.digests import cache_path, load_cache, save_cache, signature
from engine.tensorrt import PACKAGES

_LIBRARIES = (
    "enginehouse",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "gguf",
    "triton",
    *PACKAGES,
)


def build_key(checkpoint: Path, build_config: BuildConfig) -> str:
    """Digest of everything that may decide the engine: whatever lies in the directory, the options, the libraries.

    To be taken before the build: files may change while it reads them.
    """
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    files = {file.name: signature(file) for file in directory.iterdir() if file.is_file()}
    facts = {
        "checkpoint": str(checkpoint.relative_to(directory)),
        "files": files,
        "calibration": _text(build_config),
        "options": asdict(build_config) | {"device": build_config.target},
        "recipe": RECIPE_VERSION,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _text(build_config: BuildConfig) -> dict[str, object]:
    """What tells the person's calibration text from its next version."""
    calib = build_config.calib_config
    if build_config.quant_config is None or calib is None or not calib.calib_dataset:
        return {}
    path = Path(calib.calib_dataset).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): signature(file) for file in files}


def recall(key: str) -> str | None:
    """The id of the engine that this build has given last; None if nobody knows."""
    return load_cache(_file()).get(key)


def remember(key: str, engine_id: str) -> None:
    """Keeps it. Best effort: what is lost costs time only."""
    save_cache(_file(), load_cache(_file()) | {key: engine_id})


def _file() -> Path:
    return cache_path().with_name("builds.json")


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
