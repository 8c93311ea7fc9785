"""API keys: what the file keeps, what is let in, and what commands do to it."""

import argparse
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EnginehouseError, FailedPrecondition, PermissionDenied, Unauthenticated
from enginehouse import key_file
from enginehouse.cli import main
from protos.access import Access
from protos.keys import ANYBODY, ApiKey, KeyFile, Keyring, Tenant, read_key_file
from protos.options import add_options
from protos.watched import Watched


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Call:
    """What a guard sees of a call."""

    def __init__(self, *metadata: tuple[str, str | bytes], **certificate: list[bytes]) -> None:
        self._metadata, self._certificate = metadata, certificate

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._certificate


def ours(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


# --- keys


def test_the_file_holds_no_secret_and_the_key_is_found_by_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = key_file.add(path, "acme"), key_file.add(path, "acme", max_streams=3)
    other = key_file.add(path, "other")
    assert len({first.secret, second.secret, other.secret}) == 3
    assert all(len(key.secret) == 3 + 43 for key in (first, second, other))  # 256 bits in base64
    assert not any(
        key.secret in path.read_text() or key.secret[3:] in path.read_text() for key in (first, second, other)
    )
    ring = Keyring(path)
    assert ring.find(first.secret) == ring.find(second.secret) == Tenant("acme", max_streams=3)  # two are valid at once
    assert ring.find(other.secret).name == "other"


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    key_file.add(path, "acme")
    return Keyring(path)


@settings(max_examples=50)
@given(text=st.text(max_size=60))
def test_whatever_else_is_given_is_not_known(ring: Keyring, text: str) -> None:
    with pytest.raises(Unauthenticated, match="not known"):
        ring.find(text)


def test_a_key_that_shares_the_id_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    """What a digest begins with only says where to look."""
    path = tmp_path / "keys.json"
    made = key_file.add(path, "acme")
    file = read_key_file(path)
    forged = ApiKey(made.kept.id, "acme", made.kept.id + "0" * 56, made.kept.created)
    path.write_text(json.dumps({"tenants": [{"name": "acme"}], "keys": [{**_fields(forged)}]}))
    with pytest.raises(Unauthenticated):
        Keyring(path).find(made.secret)
    path.write_text(json.dumps({"tenants": [{"name": "acme"}], "keys": [_fields(forged), _fields(file.keys[0])]}))
    assert Keyring(path).find(made.secret).name == "acme"


def _fields(key: ApiKey) -> dict[str, Any]:
    return {name: getattr(key, name) for name in key.__struct_fields__}


def test_a_key_ends_at_its_time(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    made = key_file.add(path, "acme", 3600)
    clock.now = made.kept.ends - 1
    ring = Keyring(path, clock)
    assert ring.find(made.secret).name == "acme"
    clock.now += 1
    with pytest.raises(Unauthenticated, match="of tenant 'acme' has expired") as told:
        ring.find(made.secret)
    assert told.value.reason == "API_KEY_EXPIRED"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "Expected `object`"),
        ("{", "truncated"),
        ('{"tenants": [{"name": "a"}, {"name": "a"}]}', "tenant 'a' is there twice"),
        ('{"tenants": [{"name": "a b"}]}', "'a b' is no tenant's name"),
        ('{"tenants": [{"name": "a", "max_streams": 0}]}', "max_streams of tenant 'a' is 0"),
        ('{"tenants": [{"name": "a", "max_stream": 1}]}', "unknown field `max_stream`"),
        (
            '{"keys": [{"id": "00000000", "tenant": "a", "sha256": "' + "0" * 64 + '", "created": ""}]}',
            "not among the tenants",
        ),
        (
            '{"tenants": [{"name": "a"}], "keys": [{"id": "1", "tenant": "a", "sha256": "0", "created": ""}]}',
            "sha256 is 64 hexadecimal digits",
        ),
        (
            '{"tenants": [{"name": "a"}], "keys": [{"id": "00000000", "tenant": "a", "sha256": "' + "0" * 64 + '", '
            '"created": "", "expires": "soon"}]}',
            "expires at no time",
        ),
    ],
)
def test_a_file_that_is_none_is_told_in_words(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(FailedPrecondition, match="is no file of API keys: ") as told:
        Keyring(tmp_path / "keys.json")
    assert said in told.value.message
    with pytest.raises(EnginehouseError, match="enginehouse keys add"):
        Keyring(tmp_path / "nothing.json")


# --- files that change


def test_a_file_is_read_again_when_it_changes_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock, loads = tmp_path / "keys.json", Clock(), []
    first = key_file.add(path, "acme")

    def load() -> KeyFile:
        loads.append(1)
        return read_key_file(path)

    watched = Watched([path], load, clock)
    key_file.revoke(path, first.kept.id)
    assert len(watched.get().keys) == 1  # not looked at since
    clock.now += 1
    assert watched.get().keys == () and watched.version == 2
    path.write_text("{")
    clock.now += 1
    assert watched.get().tenants == (Tenant("acme"),) and watched.version == 2
    assert "cannot be used, what it said before stays in force" in caplog.text
    path.unlink()
    clock.now += 1
    assert watched.get().tenants == (Tenant("acme"),)
    key_file.add(path, "new")
    clock.now += 1
    assert watched.get().tenants == (Tenant("new"),) and watched.version == 3
    clock.now += 1
    watched.get()
    assert len(loads) == 5  # once at the beginning, and once for each change


# --- who is let in


def test_a_call_needs_a_key_in_its_metadata(tmp_path: Path) -> None:
    made = key_file.add(tmp_path / "keys.json", "acme")
    access = Access(keyring=Keyring(tmp_path / "keys.json"))
    for metadata, reason in (
        ((), "API_KEY_MISSING"),
        ((("authorization", f"Basic {made.secret}"),), "API_KEY_MALFORMED"),
        ((("authorization", made.secret),), "API_KEY_MALFORMED"),
        ((("authorization", "Bearer "),), "API_KEY_UNKNOWN"),
        ((("authorization", "Bearer eh_wrong"),), "API_KEY_UNKNOWN"),
        ((("x-api-key", made.secret),), "API_KEY_MISSING"),
    ):
        with pytest.raises(Unauthenticated) as told:
            access.check("/enginehouse.v1.Gateway/ListModels", Call(*metadata))
        assert told.value.reason == reason
        assert made.secret not in told.value.message
    for word in ("Bearer", "bearer", "BEARER"):
        access.check("/enginehouse.v1.Gateway/ListModels", Call(("authorization", f"{word} {made.secret}")))
    access.check("/grpc.health.v1.Health/Check", Call())


def test_a_client_needs_one_of_the_names() -> None:
    access = Access(names=frozenset(("gateway", "spiffe://house/gateway")))
    method = "/enginehouse.v1.Executor/Run"
    access.check(method, Call(x509_common_name=[b"gateway"]))
    access.check(method, Call(x509_common_name=[b"x"], x509_subject_alternative_name=[b"y", b"spiffe://house/gateway"]))
    access.check("/grpc.health.v1.Health/Check", Call())
    for certificate, shown in (
        ({}, "says nothing"),
        ({"x509_common_name": [b"client"], "x509_subject_alternative_name": [b"b", b"a"]}, "says a, b, client"),
        ({"x509_common_name": [b"gateway.evil"]}, "gateway.evil"),
        ({"x509_subject": [b"gateway"]}, "says nothing"),
    ):
        with pytest.raises(PermissionDenied, match=f"{shown} may not call Run here") as told:
            access.check(method, Call(**certificate))
        assert told.value.reason == "CLIENT_DENIED"


@pytest.mark.parametrize("service", ["builder", "executor", "gateway"])
def test_who_would_obey_everybody_says_so(service: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Executors and builders do not start; a gateway warns."""
    key_file.add(tmp_path / "keys.json", "acme")

    def start(*words: str) -> str:
        caplog.clear()
        parser = argparse.ArgumentParser()
        parser.add_argument("--host")
        add_options(parser)
        try:
            Access.of(service, parser.parse_args(words))
        except FailedPrecondition as error:
            assert error.reason == "OPEN_TO_EVERYBODY" and service != "gateway"
            return error.message
        return caplog.text

    said = f"{service} on 0.0.0.0 would obey everybody who reaches it: give --api-keys or --tls-ca"
    for host in ("0.0.0.0", "::", "10.0.0.7", "executor-1"):  # noqa: S104
        assert said.replace("0.0.0.0", host) in start("--host", host)  # noqa: S104
        assert start("--host", host, "--insecure") == start("--host", host, "--api-keys", f"{tmp_path}/keys.json") == ""
    for host in ("127.0.0.1", "127.0.0.5", "localhost", "[::1]"):
        assert start("--host", host) == ""


def test_a_tenant_uses_the_models_that_it_may() -> None:
    tenant = Tenant("acme", models=("demo", "llama-*"))
    assert [
        name for name in ("demo", "demo2", "llama-8b", "Llama-8b", "llama-", "xllama-8b") if tenant.allows(name)
    ] == [
        "demo",
        "llama-8b",
        "llama-",
    ]
    with pytest.raises(PermissionDenied, match="tenant 'acme' may not use model 'gpt'"):
        tenant.check_model("gpt")
    assert ANYBODY.allows("anything")


# --- commands


def test_keys_are_added_listed_and_revoked(tmp_path: Path) -> None:
    path, out = tmp_path / "keys.json", tmp_path / "acme.key"
    added = ours("keys", "add", path, "acme", "--model", "demo", "--model", "llama-*", "--max-streams", 2)
    assert added.exit_code == 0, added.output
    secret = added.stdout.strip()
    assert Keyring(path).find(secret) == Tenant("acme", models=("demo", "llama-*"), max_streams=2)
    assert secret not in added.stderr and "of tenant acme" in added.stderr
    more = ours("keys", "add", path, "acme", "--out", out, "--expires", "90d", "--max-priority", 5)
    assert more.exit_code == 0 and more.stdout == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert Keyring(path).find(out.read_text().strip()) == Tenant("acme", ("demo", "llama-*"), 2, max_priority=5)
    again = ours("keys", "add", path, "acme", "--out", out)
    assert again.exit_code == 1 and "exists and is not overwritten" in again.output

    listed = json.loads(ours("keys", "ls", path, "--json").stdout)
    assert [key["tenant"] for key in listed["keys"]] == ["acme", "acme"]
    shown = ours("keys", "ls", path).stdout
    ids = [key["id"] for key in listed["keys"]]
    assert all(key in shown for key in ids) and "demo llama-*" in shown and "never" in shown
    assert ours("keys", "revoke", path, ids[0]).exit_code == 0
    with pytest.raises(Unauthenticated):
        Keyring(path).find(secret)
    refused = ours("keys", "revoke", path, ids[0])
    assert refused.exit_code == 1 and f"has no key '{ids[0]}'; there are: {ids[1]}" in refused.output
    assert json.loads(ours("keys", "add", path, "new", "--json").stdout)["key"].startswith("eh_")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add", "keys.json", "a b"), "'a b' is no tenant's name"),
        (("add", "nowhere/keys.json", "acme"), "cannot write nowhere/keys.json: No such file or directory"),
        (("ls", "nowhere.json"), "cannot read the API keys in nowhere.json"),
        (("add", "keys.json", "acme", "--out", "nowhere/key"), "cannot write nowhere/key"),
        (("add", "keys.json", "acme", "--expires", "99999999d"), "date value out of range"),
    ],
)
def test_what_cannot_be_done_to_keys_is_told(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ours("keys", *words)
    assert result.exit_code == 1 and said in result.output
    assert list(tmp_path.iterdir()) == []
