"""Signatures of engines: who vouches for a manifest, and through its digests for every file of the engine.

signatures/<engine_id>/<key_id>.json     an Ed25519 signature over the manifest's bytes as they are stored

`cryptography` is imported when a key is used: most who open a store use none.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine import registry
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.store import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PREFIX = "signatures/"
_DOMAIN = b"enginehouse-manifest-v1\n"  # so that no signature over anything else is one over a manifest
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class _Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key_id: str
    public_key: str  # base64 of the raw 32 bytes, for people: nobody trusts it
    signature: str  # base64


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key: its raw 32 bytes."""

    raw: bytes

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 of the raw key."""
        return sha256(self.raw).hexdigest()[:16]

    def pem(self) -> str:
        """SubjectPublicKeyInfo, as openssl reads and writes it."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        key = Ed25519PublicKey.from_public_bytes(self.raw)
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_bytes(serialization.Encoding.PEM, form).decode()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the holder of the private key has signed this message."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """An Ed25519 private key; shows nothing of itself."""

    def __init__(self, key: "Ed25519PrivateKey") -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """The signature, 64 bytes."""
        return self._key.sign(message)

    def pem(self) -> bytes:
        """PKCS8, not encrypted."""
        from cryptography.hazmat.primitives import serialization

        form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return self._key.private_bytes(serialization.Encoding.PEM, form, plain)


def generate(path: Path) -> PrivateKey:
    """Makes a new key and writes it to a file that only its owner can read.

    Raises:
        FailedPrecondition: the file exists; no key is ever overwritten.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = PrivateKey(Ed25519PrivateKey.generate())
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise FailedPrecondition(
            f"{path} exists and is not overwritten: choose another file", reason="KEY_EXISTS"
        ) from None
    with os.fdopen(handle, "wb") as file:
        file.write(private.pem())
        file.flush()
        os.fsync(file.fileno())
    return private


def load_private(path: Path) -> PrivateKey:
    """The private key in a PEM file. Raises InvalidArgument naming the file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise _bad(
            path, "no Ed25519 private key without a password in PEM form; make one: enginehouse keys generate FILE"
        )
    return PrivateKey(key)


def load_public(path: Path) -> tuple[PublicKey, ...]:
    """The public keys in a PEM file, one or more, or in all *.pem files of a directory.

    Raises:
        InvalidArgument: it names the file that cannot be read, is no such file, or the directory without any.
    """
    if path.is_dir():
        files = sorted(path.glob("*.pem"))
        if not files:
            raise _bad(path, "a directory without *.pem files")
        return tuple(key for file in files for key in load_public(file))
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path)
    if b"PRIVATE KEY-----" in data:  # it must not be copied to where keys are trusted
        raise _bad(path, f"a private key; give its public one: enginehouse keys show {path}")
    keys: list[PublicKey] = []
    for block in _PUBLIC_PEM.findall(data):
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise _bad(path, f"a file with a public key (number {len(keys) + 1}) that is not Ed25519")
        keys.append(PublicKey(key.public_bytes_raw()))
    if not keys:
        raise _bad(path, "no file with public keys in PEM form; print one: enginehouse keys show FILE")
    return tuple(keys)


def sign(store: Store, engine_id: str, private: PrivateKey, digest: str | None = None) -> str:
    """Signs an engine's manifest, unless this key has signed it already; the key's id.

    Args:
        digest: SHA-256 of the manifest that is meant; None for whatever is stored.

    Raises:
        NotFound, DataLoss: no such engine, or its manifest is damaged.
        FailedPrecondition: another manifest is stored.
    """
    _, data = registry.stored(store, engine_id)
    if digest not in (None, hashlib.sha256(data).hexdigest()):
        raise FailedPrecondition(
            f"the manifest of engine {engine_id} in {store.url} is not the one that was built, and is not signed: find out "
            f"who has changed it, remove it with `enginehouse engines rm {engine_id}`, and build again",
            reason="MANIFEST_CHANGED",
        )
    public = private.public
    if not signed_by(store, engine_id, data, (public,)):
        record = _Signature(public.id, _base64(public.raw), _base64(private.sign(_DOMAIN + data)))
        store.replace(_key(engine_id, public), msgspec.json.encode(record))
    return public.id


def signed_by(store: Store, engine_id: str, data: bytes, trusted: Iterable[PublicKey]) -> tuple[str, ...]:
    """Ids of the trusted keys whose signature is one over these bytes, a manifest's."""
    return tuple(key.id for key in dict.fromkeys(trusted) if _has_signed(store, engine_id, data, key))


def claims(store: Store, engine_id: str) -> list[str]:
    """Ids of all keys under which a signature of an engine is stored, not verified; sorted."""
    return sorted(key_id for _, key_id in _stored(store, f"{PREFIX}{engine_id}/"))


def all_claims(store: Store) -> dict[str, list[str]]:
    """The same of every engine, in one listing: engine id -> key ids."""
    found: dict[str, list[str]] = {}
    for engine_id, key_id in _stored(store, PREFIX):
        found.setdefault(engine_id, []).append(key_id)
    return found


def remove_all(store: Store, engine_id: str) -> None:
    """Deletes the signatures of an engine."""
    for entry in list(store.list(f"{PREFIX}{engine_id}/")):
        store.delete(entry.key)


def _has_signed(store: Store, engine_id: str, data: bytes, key: PublicKey) -> bool:
    try:
        record = msgspec.json.decode(store.read(_key(engine_id, key)), type=_Signature)
        return key.verifies(base64.b64decode(record.signature, validate=True), _DOMAIN + data)
    except (NotFound, msgspec.MsgspecError, ValueError):
        return False


def _stored(store: Store, prefix: str) -> Iterable[tuple[str, str]]:
    for entry in store.list(prefix):
        parts = entry.key.removesuffix(".json").split("/")
        if len(parts) == 3:
            yield parts[1], parts[2]


def _key(engine_id: str, key: PublicKey) -> str:
    return f"{PREFIX}{engine_id}/{key.id}.json"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _bad(path, f"not readable ({error.strerror})") from None


def _bad(path: Path, what: str) -> InvalidArgument:
    return InvalidArgument(f"key file {path} is {what}", reason="KEY_INVALID")
