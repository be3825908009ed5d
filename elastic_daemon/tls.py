"""TLS of the public socket, by vLLM's flags. `client_tls` has that of who connects to it."""

from __future__ import annotations

import ssl
from dataclasses import asdict, dataclass
from typing import Any

from elastic_daemon.errors import ConfigError


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

    def load_into(self, context: ssl.SSLContext) -> None:
        """Serve new connections with what the files have now. Raises ConfigError.

        An authority that its file does not have any more stays trusted: OpenSSL forgets none.
        """
        try:
            context.load_cert_chain(self.certfile, self.keyfile, password=_no_password)
        except OSError as error:
            raise ConfigError(f"--ssl-certfile {self.certfile}: {reason_of(error)}") from error
        try:
            if self.ca_certs is not None:
                context.load_verify_locations(self.ca_certs)
        except OSError as error:
            raise ConfigError(f"--ssl-ca-certs {self.ca_certs}: {reason_of(error)}") from error

    def check(self) -> None:
        """Raises ConfigError when a server could not be made of it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.load_into(context)
        if self.cert_reqs != ssl.CERT_NONE and self.ca_certs is None:
            raise ConfigError(f"--ssl-cert-reqs {self.cert_reqs}: clients are checked against --ssl-ca-certs: give it")
        try:
            if self.ciphers is not None:
                context.set_ciphers(self.ciphers)
        except ssl.SSLError as error:
            raise ConfigError(f"--ssl-ciphers {self.ciphers}: {reason_of(error)}") from error


def tls_from_message(message: dict[str, Any] | None) -> Tls | None:
    return Tls(**message) if message is not None else None


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal, and a daemon would wait there for ever.
    raise ConfigError("--ssl-keyfile: a key with a passphrase cannot be used")


def reason_of(error: OSError) -> str:
    """In OpenSSL's words, or the system's."""
    return (error.strerror or str(error)).strip()
