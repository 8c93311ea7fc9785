"""What the services of a local cluster are given, and what the command line brings to them."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.errors import InvalidArgument
from enginehouse import credentials, key_file
from enginehouse.certificates import generate
from enginehouse.cli import main
from enginehouse.cluster_security import ClusterSecurity, without_credentials
from enginehouse.credentials import Given, typed, typed_environment


def test_without_certificates_and_keys_nothing_is_said() -> None:
    open_ = ClusterSecurity()
    assert [open_.options(service) for service in ("builder", "executor", "gateway")] == [[], [], []]
    assert open_.client == Given()
    open_.check()


def test_each_service_has_its_certificate_and_lets_in_whom_it_serves(tmp_path: Path) -> None:
    generate(tmp_path, ["127.0.0.1"])
    secured = ClusterSecurity(tmp_path)
    secured.check()
    for service, clients in (("builder", ["client"]), ("executor", ["gateway", "client"]), ("gateway", [])):
        options = secured.options(service)
        assert options[:2] == ["--tls-cert", f"{tmp_path}/{service}.pem"]
        assert [options[at + 1] for at, option in enumerate(options) if option == "--allow-client"] == clients
        assert ("--executor-tls-cert" in options) == (service == "gateway")
        assert "--tls-ca" in options
        files = [Path(value) for value in options if value.endswith(".pem")]
        assert all(path.exists() for path in files) and len(files) == (6 if service == "gateway" else 3)
    with_keys = ClusterSecurity(tmp_path, tmp_path / "keys.json").options("gateway")
    assert "--tls-ca" not in with_keys  # a key says who calls
    assert with_keys[-2:] == ["--api-keys", f"{tmp_path}/keys.json"]


def test_up_needs_a_key_of_its_own_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENGINEHOUSE_API_KEY", "ENGINEHOUSE_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    secured = ClusterSecurity(api_keys=tmp_path / "keys.json")
    with pytest.raises(InvalidArgument, match="and `up` itself has none"):
        secured.check()
    with typed(Given(api_key=key_file.add(tmp_path / "keys.json", "me").secret)):
        secured.check()
    assert typed_environment() == {}


def test_services_inherit_no_credentials_of_clients() -> None:
    kept = {"ENGINEHOUSE_HOME": "/data", "PATH": "/bin", "ENGINEHOUSE_LOG_FORMAT": "json"}
    given = {"ENGINEHOUSE_API_KEY": "a", "ENGINEHOUSE_API_KEY_FILE": "b", "ENGINEHOUSE_TLS_CA": "c"}
    assert without_credentials({**kept, **given, "ENGINEHOUSE_EXECUTOR_TLS_CA": "d"}) == kept


def test_what_is_given_counts_before_what_was_typed_and_that_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINEHOUSE_API_KEY", "of-environment")
    file = tmp_path / "key"
    file.write_text("of-file\n")

    def key(given: Given = credentials.Given()) -> str:  # noqa: B008
        found = credentials.find(given)
        assert found.api_key
        return found.api_key()

    assert key() == "of-environment"
    with typed(Given(api_key_file=str(file))):
        assert key() == "of-file"
        assert key(Given(api_key="given")) == "given"
        assert typed_environment() == {"ENGINEHOUSE_API_KEY_FILE": str(file)}
        with typed(Given(tls_ca="ca.pem")):
            assert typed_environment() == {"ENGINEHOUSE_API_KEY_FILE": str(file), "ENGINEHOUSE_TLS_CA": "ca.pem"}
    assert key() == "of-environment"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tls-ca", "nowhere.pem", "models"), "cannot read nowhere.pem"),
        (("--tls-cert", "a.pem", "models"), "--tls-cert is given without --tls-key"),
        (("--api-key-file", "nowhere.key", "generate", "x", "--model", "m"), "cannot read the API key in nowhere.key"),
        (("up", "--certs", "nowhere"), "/nowhere/client.pem"),
    ],
)
def test_files_that_are_not_there_are_told_before_anything_starts(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(main, [*words])
    assert result.exit_code == 1 and said in result.output, result.output
    assert list(tmp_path.iterdir()) == []
