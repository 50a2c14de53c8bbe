"""Certificate files: which are taken, and what is said about the others."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

from services.gateway.tls import leaf_of, server_context
from shared.errors import SettingsError
from tests.gateway.certificates import chain, openssl, recipe, self_signed


def refused(cert: object, key: object) -> str:
    with pytest.raises(SettingsError) as caught:
        server_context(str(cert), str(key))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_files_are_no_tls() -> None:
    """Plain HTTP is the default."""
    assert server_context("", "") is None


def test_the_recipe_of_the_page_works(tmp_path: Path) -> None:
    """One openssl command makes files that are taken as they are; nothing older than TLS 1.2 is spoken."""
    cert, key = recipe(tmp_path)
    context = server_context(str(cert), str(key))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert leaf_of(str(cert)) == cert.read_text()


def test_the_leaf_of_a_chain_is_its_first(tmp_path: Path) -> None:
    """A chain file is taken, and the server's own certificate found in it."""
    _, full, key = chain(tmp_path)
    assert server_context(str(full), str(key)) is not None
    assert leaf_of(str(full)).strip() in (tmp_path / "leaf.crt").read_text()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless systemd keeps it, in a directory that only the service can enter."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    cert, key = self_signed(tmp_path, "a")
    key.chmod(mode)
    assert f"gateway.tls_key: others can use {key} (chmod 600 {key})" in refused(cert, key)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "other"))
    refused(cert, key)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert server_context(str(cert), str(key)) is not None


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    """Missing, one of two, of two certificates, damaged, swapped, encrypted: each is named."""
    cert, key = self_signed(tmp_path, "a")
    _, other = self_signed(tmp_path, "b")
    assert "gateway.tls_key is not" in refused(cert, "")
    assert "gateway.tls_cert is not" in refused("", key)
    assert "gateway.tls_key: cannot read" in refused(cert, tmp_path / "missing")
    assert "gateway.tls_cert: cannot read" in refused(tmp_path / "missing", key)
    assert f"{other} is not the key of {cert}" in refused(cert, other)
    assert "no certificate" in refused(key, key)
    os.chmod(cert, 0o600)
    assert "cannot be used" in refused(cert, cert)
    empty = tmp_path / "empty"
    empty.touch(0o600)
    assert "cannot be used" in refused(cert, empty)
    assert "no certificate" in refused(empty, key)
    damaged = tmp_path / "damaged.crt"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    assert "cannot be used" in refused(damaged, key)
    sealed = tmp_path / "sealed.key"
    openssl("pkey", "-in", str(key), "-aes128", "-passout", "pass:x", "-out", str(sealed))
    assert "encrypted" in refused(cert, sealed)
    traditional = tmp_path / "traditional.key"
    openssl("ec", "-in", str(key), "-aes128", "-passout", "pass:x", "-out", str(traditional))
    assert "encrypted" in refused(cert, traditional)
    for secret in (sealed, traditional):
        assert secret.stat().st_mode & 0o077 == 0
