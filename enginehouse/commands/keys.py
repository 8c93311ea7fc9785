"""`enginehouse keys`: the keys that engines are signed with."""

from pathlib import Path

from engine import signing
from engine.signing import PublicKey
from enginehouse.tables import print_json


def generate(path: Path, *, as_json: bool) -> None:
    """Makes a private key and shows its public one."""
    public = signing.generate(path).public
    if as_json:
        print_json(_described(public))
        return
    print(f"wrote a private key to {path}: keep it secret")
    print(f"key id: {public.id}")
    print(f"next:   enginehouse keys show {path}    (what executors take as --trusted-keys)")


def show(path: Path, *, as_json: bool) -> None:
    """Shows the public keys in a file of private or public ones, as a file that can be trusted."""
    private = path.is_file() and b"PRIVATE KEY-----" in path.read_bytes()
    found = (signing.load_private(path).public,) if private else signing.load_public(path)
    if as_json:
        print_json([_described(key) for key in found])
        return
    for key in found:
        print(f"key id: {key.id}\n{key.pem()}", end="")


def _described(key: PublicKey) -> dict[str, str]:
    return {"key_id": key.id, "public_key": key.pem()}
