"""TLS of the operator's commands: whose certificates they believe, and the one that they prove themselves with."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from elastic_daemon.errors import ConfigError
from elastic_daemon.gates.tls import reason_of

VARIABLES = {"--cacert": "ELASTIC_CACERT", "--cert": "ELASTIC_CERT", "--cert-key": "ELASTIC_CERT_KEY"}
"""By flag: each wins over its variable."""

CERTIFICATE, PRIVATE_KEY = b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----"


class _File(NamedTuple):
    """`named`: the flag or variable that names it."""

    named: str
    path: str

    def __str__(self) -> str:
        return f"{self.named} {self.path}"


def client_tls(
    environ: Mapping[str, str], cacert: Path | None = None, cert: Path | None = None, cert_key: Path | None = None
) -> ssl.SSLContext | None:
    """How a client of ours connects to an `https` address.

    It believes the authorities in the file that is given, and no others, or without one those of its library. It has
    the certificate that is given, for daemons that ask for one; None where neither is given.

    Raises:
        ConfigError: a file cannot be read, lacks what it should have, or does not belong to the other.
    """
    authorities, own, key = (
        _given(flag, path, environ) for flag, path in zip(VARIABLES, (cacert, cert, cert_key), strict=True)
    )
    if key is not None and own is None:
        raise ConfigError(f"{key}: the certificate that this key belongs to is needed too: give it with --cert")
    if authorities is None and own is None:
        return None
    context = _believing(authorities)
    if own is not None:
        _prove_with(context, own, key)
    return context


def _given(flag: str, path: Path | None, environ: Mapping[str, str]) -> _File | None:
    if path is not None:
        return _File(flag, str(path))
    variable = VARIABLES[flag]
    return _File(variable, environ[variable]) if environ.get(variable) else None


def _believing(authorities: _File | None) -> ssl.SSLContext:
    if authorities is None:
        import httpx

        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=authorities.path)
    except OSError as error:
        raise ConfigError(f"{authorities}: {reason_of(error)}") from error


def _prove_with(context: ssl.SSLContext, own: _File, key: _File | None) -> None:
    def no_password() -> str:
        # Without this OpenSSL would ask on the terminal, and a script would wait there for ever.
        raise ConfigError(f"{key or own}: a key with a passphrase cannot be used")

    try:
        context.load_cert_chain(own.path, key.path if key is not None else None, password=no_password)
    except OSError as error:
        raise ConfigError(_problem(error, own, key)) from error


def _problem(error: OSError, own: _File, key: _File | None) -> str:
    """What is wrong with which of the files: OpenSSL does not say."""
    for file, mark, what in ((own, CERTIFICATE, "certificate"), (key or own, PRIVATE_KEY, "private key")):
        try:
            found = mark in Path(file.path).read_bytes()
        except OSError as unread:
            return f"{file}: {reason_of(unread)}"
        if not found:
            hint = ": give its file with --cert-key" if mark is PRIVATE_KEY and key is None else ""
            return f"{file}: no {what} in it{hint}"
    if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
        return f"{key or own}: this is not the key of the certificate in {own.path}"
    return f"{own}: {reason_of(error)}"
