"""Which files of a checkpoint count, and the checkpoints that clients have uploaded, in a store.

checkpoints/<id>.json     which files it has; the files are blobs. Garbage collection drops it after a week
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec

from engine.errors import DataLoss, InvalidArgument, NotFound
from engine.manifest import FileRef, engine_id
from engine.store import Store

SETTINGS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
"""Patterns of what a build reads beside the weights, in the checkpoint's directory itself."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
"""Patterns of weights. A build reads those of the first that a checkpoint has."""
NOT_FILES = ("*/*", ".*", "consolidated*.safetensors", "mmproj*.gguf")
"""What the patterns above would take too: folders, the same weights in another layout (Mistral's), image encoders."""

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_ID = re.compile(r"[0-9a-f]{64}")


class UploadedCheckpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint's files, sorted by name."""

    files: tuple[FileRef, ...]

    @property
    def id(self) -> str:
        """SHA-256 over names and digests: the same files give the same id."""
        return engine_id({file.name: file.digest for file in self.files})


def is_read(name: str) -> bool:
    """Whether a build may read the checkpoint's file of this name."""
    return _matches(name, (*SETTINGS, *WEIGHTS))


def is_setting(name: str) -> bool:
    """Whether it is one of them that holds no weights."""
    return _matches(name, SETTINGS)


def choose_files(names: Iterable[str], weights: bool = True) -> list[str]:
    """Which files of a checkpoint a build reads, sorted.

    Args:
        weights: whether there must be some beside a config.json: builds with dummy weights do without.

    Raises InvalidArgument when they are no checkpoint, or several: config.json and weights, or one model in GGUF, make one.
    """
    names = sorted(name for name in names if is_read(name))
    kinds = [[name for name in names if _matches(name, (pattern,))] for pattern in WEIGHTS]
    found = next((kind for kind in kinds if kind), [])
    if found and found[0].endswith(".gguf"):
        if len(models := gguf_models(found)) > 1:
            raise InvalidArgument(
                f"there are several GGUF files, {', '.join(models)}: choose one", reason="GGUF_AMBIGUOUS"
            )
    elif "config.json" not in names or (weights and not found):
        missing = "*.safetensors or pytorch_model.bin" if "config.json" in names else "config.json"
        raise InvalidArgument(
            f"there is no {missing} among the files: a checkpoint in Hugging Face layout has one, or give a .gguf file",
            reason="CHECKPOINT_INCOMPLETE",
        )
    return sorted([*filter(is_setting, names), *found])


def gguf_models(names: Iterable[str]) -> list[str]:
    """The models among names of GGUF files, with or without folders: parts of one count once, by the first."""
    found = sorted(name for name in names if name.endswith(".gguf") and _matches(name.rpartition("/")[2], WEIGHTS))
    return [name for name in found if gguf_parts(name)[0] == name]


def gguf_parts(name: str) -> list[str]:
    """The names of all parts of the model that a GGUF file, named with or without folders, belongs to."""
    part = _PART.fullmatch(name)
    count = int(part["count"]) if part else 0
    if not part or not 1 <= int(part["number"]) <= count:
        return [name]
    return [f"{part['stem']}-{number:05d}-of-{part['count']}.gguf" for number in range(1, count + 1)]


def model_name(file: str) -> str:
    """A GGUF file's name without its ending and its part's number."""
    part = _PART.fullmatch(file)
    return part["stem"] if part else file.removesuffix(".gguf")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns) and not any(
        fnmatchcase(name, pattern) for pattern in NOT_FILES
    )


def check_file_name(name: str) -> str:
    """The name itself. Raises InvalidArgument unless it is one of a plain, visible file, without folders."""
    if not name or name[0] == "." or len(name.encode(errors="replace")) > 255 or re.search(r"[/\\\x00-\x1f]", name):
        raise InvalidArgument(
            f"file name {name[:80]!r}: give the name of a file in the checkpoint's directory, without folders, that does "
            "not begin with a dot",
            reason="FILE_NAME_INVALID",
        )
    return name


def put(store: Store, checkpoint: UploadedCheckpoint) -> str:
    """Makes a checkpoint known, whose files are in the store as blobs; its id."""
    store.replace(_key(checkpoint.id), msgspec.json.encode(checkpoint))  # a new time: the week begins again
    return checkpoint.id


def get(store: Store, checkpoint_id: str) -> UploadedCheckpoint:
    """An uploaded checkpoint. Raises InvalidArgument, NotFound and DataLoss."""
    key = _key(checkpoint_id)
    try:
        return msgspec.json.decode(store.read(key), type=UploadedCheckpoint)
    except NotFound:
        raise NotFound(
            f"no uploaded checkpoint {checkpoint_id[:12]} in {store.url}: upload it again",
            reason="CHECKPOINT_NOT_FOUND",
        ) from None
    except msgspec.MsgspecError as error:
        raise DataLoss(
            f"{key} in {store.url} is damaged ({error}): upload it again", reason="CHECKPOINT_INVALID"
        ) from None


def check_id(checkpoint_id: str) -> str:
    """The id itself. Raises InvalidArgument for what is none."""
    if not _ID.fullmatch(checkpoint_id):
        raise InvalidArgument(
            f"checkpoint id {checkpoint_id[:80]!r} is not 64 hexadecimal digits", reason="CHECKPOINT_ID_INVALID"
        )
    return checkpoint_id


def _key(checkpoint_id: str) -> str:
    return f"checkpoints/{check_id(checkpoint_id)}.json"
