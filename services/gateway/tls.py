"""HTTPS from certificate files.

Invariant: a key that others can read, or files that do not work, are found at the start and named in one line. The
files are read then and never again.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
from pathlib import Path

from shared.errors import SettingsError


def server_context(cert: str, key: str) -> ssl.SSLContext | None:
    """For the settings gateway.tls_cert and gateway.tls_key; None when both are empty. Errors: `SettingsError`."""
    if not cert and not key:
        return None
    if not cert or not key:
        given, missing = ("gateway.tls_cert", "gateway.tls_key") if cert else ("gateway.tls_key", "gateway.tls_cert")
        raise SettingsError(f"{given} is set and {missing} is not", "HTTPS needs both, plain HTTP neither")
    _check_private(Path(key))
    if b"ENCRYPTED" in _read("gateway.tls_key", Path(key)):
        raise SettingsError(
            f"gateway.tls_key: {key} is encrypted, and nobody is there to type its passphrase",
            f"write it without one: openssl pkey -in {key} -out NEW.pem",
        )
    leaf_of(cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(
                f"gateway.tls_key: {key} is not the key of {cert}", "give the two files of one certificate"
            ) from None
        raise SettingsError(
            f"gateway.tls_cert and gateway.tls_key: {cert} and {key} cannot be used: {error.reason or error}",
            "PEM files of the certificate, with its chain below, and of its key",
        ) from None
    return context


def leaf_of(cert: str) -> str:
    """The first certificate of a PEM file, which is the server's own, as PEM. Errors: `SettingsError`."""
    text = _read("gateway.tls_cert", Path(cert)).decode("ascii", "replace")
    block = re.search(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", text, re.DOTALL)
    if block is None:
        raise SettingsError(f"gateway.tls_cert: there is no certificate in {cert}", "it must be a PEM file")
    return block[0] + "\n"


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {path}: {error.strerror}", "give a PEM file") from None


def _check_private(path: Path) -> None:
    """systemd gives credentials modes of its own, in a directory that only the service can enter."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and path.resolve().is_relative_to(Path(credentials).resolve()):
        return
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SettingsError(f"gateway.tls_key: cannot read {path}: {error.strerror}", "give a PEM file") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"gateway.tls_key: others can use {path}", f"chmod 600 {path}")
