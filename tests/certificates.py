"""Certificates for the servers of tests."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Key = ec.EllipticCurvePrivateKey


class Issued(NamedTuple):
    """Files of an authority, and of the certificate that it has signed."""

    authority: Path
    cert: Path
    key: Path


def certificate(folder: Path, name: str = "localhost", passphrase: bytes | None = None) -> tuple[Path, Path]:
    """A self-signed one, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _write_cert(folder / "cert.pem", _sign(name, key, name, key)), _write_key(
        folder / "key.pem", key, passphrase
    )


def issued(folder: Path, name: str = "localhost") -> Issued:
    """One that a private authority has signed."""
    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    return Issued(
        _write_cert(folder / "authority.pem", _sign("A private authority", root, "A private authority", root)),
        _write_cert(folder / "issued.pem", _sign(name, key, "A private authority", root)),
        _write_key(folder / "issued-key.pem", key),
    )


def _sign(name: str, key: Key, issuer: str, issuer_key: Key) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    signs, public = key is issuer_key, key.public_key()
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    return (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name.replace(" ", "-"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=signs, path_length=None), critical=True)
        # From Python 3.13 on, a certificate without these proves nothing.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=signs, crl_sign=signs, decipher_only=False, **usage),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _write_cert(path: Path, cert: x509.Certificate) -> Path:
    path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    return path


def _write_key(path: Path, key: Key, passphrase: bytes | None = None) -> Path:
    kept = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kept))
    return path
