"""A small certificate authority, for trials of TLS: what a company's own gives out, or cert-manager."""

import ipaddress
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from engine.errors import FailedPrecondition

LIFE = timedelta(days=365)
_SLACK = timedelta(minutes=5)  # between the clocks of two machines


def generate(directory: Path, hosts: Sequence[str], life: timedelta = LIFE) -> list[Path]:
    """Writes ca.pem, ca-key.pem, and for servers at `hosts` and for clients a certificate and key each, as
    `<service>.pem` and `<service>-key.pem`; the files.

    The services' certificates are good for both sides, since a gateway is a client of executors: "gateway", "executor",
    "builder" and "client" are names that --allow-client takes. P-256 keys, only for their owner to read.

    Args:
        hosts: names and addresses by which clients reach the servers.

    Raises:
        FailedPrecondition: the directory holds an authority already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "ca.pem").exists():
        raise FailedPrecondition(
            f"{directory} holds an authority already: choose another directory, or remove its *.pem", reason="CA_EXISTS"
        )
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = _name(f"Enginehouse trial authority {secrets.token_hex(4)}")  # OpenSSL would take two of one name for one
    root = (
        _builder(issuer, issuer, authority.public_key(), life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA256())
    )
    written = [
        _write(directory / "ca.pem", _pem(root)),
        _write(directory / "ca-key.pem", _key_pem(authority), secret=True),
    ]
    for service in ("gateway", "executor", "builder", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(service), *(() if service == "client" else map(_host, hosts))]
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        certificate = (
            _builder(_name(service), issuer, key.public_key(), life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes[: 1 if service == "client" else 2]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(authority, hashes.SHA256())
        )
        written.append(_write(directory / f"{service}.pem", _pem(certificate)))
        written.append(_write(directory / f"{service}-key.pem", _key_pem(key), secret=True))
    return written


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - max(_SLACK, -2 * life))
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, secret: bool = False) -> Path:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o644), "wb") as file:
        file.write(data)
    return path
