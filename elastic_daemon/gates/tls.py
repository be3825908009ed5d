"""TLS of the public socket, by vLLM's flags. `client_tls` has that of who connects to it."""

from __future__ import annotations

import ssl
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_daemon.errors import ConfigError
from elastic_daemon.settings.resolve import flag_of


class TlsError(ConfigError):
    """`setting` is its name, `detail` its value and what is wrong with it. Who knows where it was given says that."""

    def __init__(self, setting: str, value: object, reason: str) -> None:
        self.setting, self.detail = setting, f"{value}: {reason}"
        super().__init__(f"{flag_of(setting)}: {self.detail}")


@dataclass(frozen=True)
class Tls:
    """Paths of certificate and key, and whether clients must have certificates too."""

    certfile: str
    keyfile: str | None = None
    ca_certs: str | None = None
    cert_reqs: int = int(ssl.CERT_NONE)
    ciphers: str | None = None

    def to_message(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def uvicorn_options(self) -> dict[str, Any]:
        return {f"ssl_{name}": value for name, value in asdict(self).items() if value is not None}

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(path for path in (self.certfile, self.keyfile, self.ca_certs) if path is not None)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Serve new connections with what the files have now. Raises TlsError.

        An authority that its file does not have any more stays trusted: OpenSSL forgets none.
        """
        try:
            context.load_cert_chain(self.certfile, self.keyfile, password=self._no_password)
        except OSError as error:
            raise self._of_pair(error) from error
        try:
            if self.ca_certs is not None:
                context.load_verify_locations(self.ca_certs)
        except OSError as error:
            raise TlsError("ssl_ca_certs", self.ca_certs, reason_of(error)) from error

    def check(self) -> None:
        """Raises TlsError when a server could not be made of it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.load_into(context)
        if self.cert_reqs != ssl.CERT_NONE and self.ca_certs is None:
            raise TlsError("ssl_cert_reqs", self.cert_reqs, "clients are checked against --ssl-ca-certs: give it")
        try:
            if self.ciphers is not None:
                context.set_ciphers(self.ciphers)
        except ssl.SSLError as error:
            raise TlsError("ssl_ciphers", self.ciphers, reason_of(error)) from error

    def _of_pair(self, error: OSError) -> TlsError:
        """OpenSSL says what is wrong with certificate and key, but not with which."""
        if self.keyfile is not None:
            if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
                return TlsError("ssl_keyfile", self.keyfile, f"not the key of the certificate in {self.certfile}")
            if _unreadable(self.certfile) is None and (unread := _unreadable(self.keyfile)) is not None:
                return TlsError("ssl_keyfile", self.keyfile, reason_of(unread))
        return TlsError("ssl_certfile", self.certfile, reason_of(error))

    def _no_password(self) -> str:
        # Without this OpenSSL would ask on the terminal, and a daemon would wait there for ever.
        setting, file = ("ssl_keyfile", self.keyfile) if self.keyfile else ("ssl_certfile", self.certfile)
        raise TlsError(setting, file, "a key with a passphrase cannot be used")


def tls_from_message(message: dict[str, Any] | None) -> Tls | None:
    return Tls(**message) if message is not None else None


def _unreadable(file: str) -> OSError | None:
    try:
        Path(file).read_bytes()
    except OSError as error:
        return error
    return None


def reason_of(error: OSError) -> str:
    """In OpenSSL's words, or the system's."""
    return (error.strerror or str(error)).strip()
