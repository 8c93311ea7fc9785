"""Signatures of engines, keys in files, and whom an executor trusts."""

import base64
import json
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from test_engine_registry import manifest, publish

from engine import registry, signing
from engine.blobs import describe, put_bytes
from engine.directory import DirectoryStore
from engine.errors import EnginehouseError, FailedPrecondition, InvalidArgument, NotFound
from engine.manifest import Manifest
from engine.signing import PrivateKey, PublicKey
from engine.store import Store
from engine.trust import Trust


@pytest.fixture
def alice(tmp_path: Path) -> PrivateKey:
    return signing.generate(tmp_path / "alice.key")


@pytest.fixture
def bob(tmp_path: Path) -> PrivateKey:
    return signing.generate(tmp_path / "bob.key")


def save(path: Path, *keys: PublicKey, between: str = "") -> Path:
    path.write_text(between.join(key.pem() for key in keys))
    return path


# Keys


def test_a_generated_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    private = signing.generate(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert signing.load_private(path).public == private.public
    with pytest.raises(FailedPrecondition, match="exists and is not overwritten") as caught:
        signing.generate(path)
    assert caught.value.reason == "KEY_EXISTS"
    assert signing.load_private(path).public == private.public


def test_openssl_knows_the_same_key(tmp_path: Path, alice: PrivateKey) -> None:
    key = serialization.load_pem_private_key((tmp_path / "alice.key").read_bytes(), None)
    public = key.public_key()
    assert isinstance(public, Ed25519PublicKey)
    assert public.public_bytes_raw() == alice.public.raw
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert pem.decode() == alice.public.pem()


def test_key_ids() -> None:
    assert PublicKey(bytes(32)).id == "66687aadf862bd77"  # SHA-256 of 32 zero bytes begins so


def test_public_keys_in_files_and_directories(tmp_path: Path, alice: PrivateKey, bob: PrivateKey) -> None:
    both = save(tmp_path / "both.pem", alice.public, bob.public, between="key id: x\n")
    assert signing.load_public(both) == (alice.public, bob.public)
    folder = tmp_path / "keys"
    folder.mkdir()
    save(folder / "b.pem", bob.public)
    save(folder / "a.pem", alice.public)
    (folder / "README").write_text("not a key")
    assert signing.load_public(folder) == (alice.public, bob.public)
    assert Trust.of_files([folder, str(both)]).trusted == (alice.public, bob.public) * 2


def test_bad_key_files_are_named(tmp_path: Path, alice: PrivateKey) -> None:
    other = generate_private_key(SECP256R1())
    pem, public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "ec.pem").write_bytes(other.public_key().public_bytes(pem, public))
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    (tmp_path / "locked.key").write_bytes(other.private_bytes(pem, form, encryption))
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut.pem").write_text(alice.public.pem().replace("MCowBQYDK2VwAyEA", ""))
    (tmp_path / "empty").mkdir()
    for name in ("no", "text", "ec.pem", "cut.pem", "empty", "alice.key"):
        with pytest.raises(InvalidArgument, match=f"key file {tmp_path / name} is") as caught:
            Trust.of_files([tmp_path / name])
        assert caught.value.reason == "KEY_INVALID"
    for name in ("no", "text", "ec.pem", "locked.key", "empty"):
        with pytest.raises(InvalidArgument, match=f"key file {tmp_path / name} is"):
            signing.load_private(tmp_path / name)
    with pytest.raises(InvalidArgument, match="a private key; give its public one"):
        signing.load_public(tmp_path / "alice.key")


# Signatures


def signers(store: Store, engine: str, keys: tuple[PublicKey, ...]) -> tuple[str, ...]:
    """Ids of these keys that have signed an engine's manifest as it is now."""
    return signing.signed_by(store, engine, registry.stored(store, engine)[1], keys)


def test_who_has_signed(store: Store, alice: PrivateKey, bob: PrivateKey) -> None:
    engine, other = publish(store, 1), publish(store, 2)
    both = (alice.public, bob.public)
    assert signers(store, engine, both) == ()
    assert signing.sign(store, engine, alice) == alice.public.id
    assert signers(store, engine, both) == (alice.public.id,)
    signing.sign(store, engine, bob)
    assert signers(store, engine, both) == (alice.public.id, bob.public.id)
    assert signers(store, engine, (bob.public,)) == (bob.public.id,)
    assert signers(store, other, both) == ()
    assert signing.claims(store, engine) == sorted(key.id for key in both)
    assert signing.all_claims(store) == {engine: signing.claims(store, engine)}
    with pytest.raises(NotFound):
        signing.sign(store, "0" * 64, alice)


def test_the_record_and_what_it_is_over(store: Store, alice: PrivateKey) -> None:
    engine = publish(store)
    signing.sign(store, engine, alice)
    record = json.loads(store.read(f"signatures/{engine}/{alice.public.id}.json"))
    assert set(record) == {"key_id", "public_key", "signature"}

    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(record["public_key"]))
    message = b"enginehouse-manifest-v1\n" + store.read(f"engines/{engine}.json")
    key.verify(base64.b64decode(record["signature"]), message)


def test_signing_again_mends_a_signature_and_leaves_a_good_one(store: Store, alice: PrivateKey) -> None:
    engine = publish(store)
    signing.sign(store, engine, alice)
    (before,) = store.list("signatures/")
    signing.sign(store, engine, alice)
    assert list(store.list("signatures/")) == [before]
    store.replace(before.key, b"{}")
    assert signers(store, engine, (alice.public,)) == ()
    signing.sign(store, engine, alice)
    assert signers(store, engine, (alice.public,)) == (alice.public.id,)


@pytest.mark.parametrize("forgery", ["manifest", "other engine", "other key", "bits", "base64", "json"])
def test_forgeries(store: Store, alice: PrivateKey, bob: PrivateKey, forgery: str) -> None:
    engine = publish(store, 1)
    signing.sign(store, engine, alice)
    key = f"signatures/{engine}/{alice.public.id}.json"
    record = json.loads(store.read(key))
    flipped = ("B" if record["signature"][0] == "A" else "A") + record["signature"][1:]
    if forgery == "manifest":
        changed = msgspec.structs.replace(manifest(1), source="elsewhere")
        store.replace(f"engines/{engine}.json", changed.to_json())
    elif forgery == "other engine":
        other = publish(store, 2)
        signing.sign(store, other, alice)
        store.replace(key, store.read(f"signatures/{other}/{alice.public.id}.json"))
    elif forgery == "other key":  # the record says whose it is; it is not believed
        signing.sign(store, engine, bob)
        store.replace(key, store.read(f"signatures/{engine}/{bob.public.id}.json"))
    elif forgery == "bits":
        store.replace(key, json.dumps({**record, "signature": flipped}).encode())
    elif forgery == "base64":
        store.replace(key, json.dumps({**record, "signature": "?"}).encode())
    else:
        store.replace(key, b"{")
    trust = Trust((alice.public,))
    assert signers(store, engine, trust.trusted) == ()
    with pytest.raises(FailedPrecondition, match=f"the signature by {alice.public.id} does not fit") as caught:
        trust.admit(store, engine)
    assert caught.value.reason == "ENGINE_SIGNATURE_INVALID"


# Trust


def refusal(store: Store, trust: Trust, engine: str) -> EnginehouseError:
    with pytest.raises(FailedPrecondition) as caught:
        trust.admit(store, engine)
    return caught.value


def test_without_trusted_keys_any_engine_of_data_is_admitted(store: Store) -> None:
    assert Trust().admit(store, publish(store)) == manifest()
    with pytest.raises(NotFound):
        Trust().admit(store, "0" * 64)


def test_an_engine_must_be_signed_by_a_trusted_key(store: Store, alice: PrivateKey, bob: PrivateKey) -> None:
    engine, trust = publish(store), Trust((alice.public, bob.public))
    error = refusal(store, trust, engine)
    assert error.reason == "ENGINE_UNSIGNED"
    for said in (engine[:12], "signed by nobody", alice.public.id, bob.public.id, f"engines sign {engine} --key FILE"):
        assert said in error.message
    signing.sign(store, engine, bob)
    assert trust.admit(store, engine) == manifest()
    error = refusal(store, Trust((alice.public,), native=True), engine)
    assert error.reason == "ENGINE_UNSIGNED"
    assert f"signed only by {bob.public.id}; trusted here: {alice.public.id}" in error.message


def native_engine(store: Store) -> Manifest:
    publish(store)
    put_bytes(store, "plan", b"code")
    plain = manifest(7)
    (rank,) = plain.ranks
    return registry.publish(
        store,
        msgspec.structs.replace(
            plain, ranks=(msgspec.structs.replace(rank, native=(describe("rank0.plan", b"code"),)),)
        ),
    )


def test_native_code_needs_a_signature_or_a_word(store: Store, alice: PrivateKey) -> None:
    engine = native_engine(store)
    assert [file.name for file in engine.files()] == ["program.json", "weights", "rank0.plan", "tokenizer.json"]
    error = refusal(store, Trust(), engine.engine_id)
    assert error.reason == "NATIVE_UNTRUSTED"
    assert "rank0.plan" in error.message
    assert "--trust-native" in error.message
    assert Trust(native=True).admit(store, engine.engine_id) == engine
    assert refusal(store, Trust((alice.public,)), engine.engine_id).reason == "ENGINE_UNSIGNED"
    signing.sign(store, engine.engine_id, alice)
    assert Trust((alice.public,)).admit(store, engine.engine_id) == engine
    assert refusal(store, Trust(), engine.engine_id).reason == "NATIVE_UNTRUSTED"


def test_a_manifest_without_native_code_has_the_bytes_that_it_always_had() -> None:
    assert b"native" not in manifest().to_json()
    assert Manifest.from_json(manifest().to_json()) == manifest()


def test_the_manifest_that_was_verified_is_the_one_that_is_used(tmp_path: Path, alice: PrivateKey) -> None:
    """A store that shows another manifest at every read."""

    class Changing(DirectoryStore):
        reads = 0

        def read(self, key: str) -> bytes:
            if key.startswith("engines/"):
                self.reads += 1
                if self.reads > 1:
                    return msgspec.structs.replace(manifest(), source="evil").to_json()
            return super().read(key)

    store = Changing(tmp_path)
    engine = publish(DirectoryStore(tmp_path))
    signing.sign(DirectoryStore(tmp_path), engine, alice)
    assert Trust((alice.public,)).admit(store, engine).source == "demo"
    assert store.reads == 1


def test_keys_cost_nothing_where_none_is_used(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom engine import gc, inventory, trust\nfrom engine.backends import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "sys.exit('cryptography' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 0
