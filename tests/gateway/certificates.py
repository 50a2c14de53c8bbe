"""Certificates as an administrator makes them: with openssl, by the recipe of docs/http-access.md."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "http-access.md"


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def recipe(directory: Path) -> tuple[Path, Path]:
    """Certificate and key for the name box.lan, by the very command of the page."""
    command = re.search(r"^    sudo (openssl req(?:.*\\\n)+.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert command is not None
    words = [word.replace("/etc/draftwire", str(directory)) for word in shlex.split(command[1].replace("\\\n", " "))]
    openssl(*words[1:])
    return directory / "tls.crt", directory / "tls.key"


def self_signed(directory: Path, name: str, subject: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """Certificate and key for a subject, issued by itself."""
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-keyout", str(key), "-out", str(cert), "-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}",
    )  # fmt: skip
    return cert, key


def chain(directory: Path) -> tuple[Path, Path, Path]:
    """An issuer's certificate, and a chain file with the key of its leaf for 127.0.0.1: leaf, intermediate."""
    root, root_key = directory / "root.crt", directory / "root.key"
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-keyout", str(root_key), "-out", str(root), "-subj", "/CN=root",
    )  # fmt: skip
    issuer, issuer_key = root, root_key
    for name, extension in (
        ("middle", "basicConstraints=critical,CA:TRUE"),
        ("leaf", "basicConstraints=CA:FALSE\nsubjectAltName=IP:127.0.0.1"),
    ):
        key, request, cert = (directory / f"{name}.{suffix}" for suffix in ("key", "csr", "crt"))
        openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", str(key), "-out", str(request),
        )  # fmt: skip
        extensions = directory / f"{name}.ext"
        extensions.write_text(extension + "\n")
        openssl(
            "x509", "-req", "-in", str(request), "-CA", str(issuer), "-CAkey", str(issuer_key), "-CAcreateserial",
            "-days", "2", "-extfile", str(extensions), "-out", str(cert),
        )  # fmt: skip
        issuer, issuer_key = cert, key
    full = directory / "chain.crt"
    full.write_text((directory / "leaf.crt").read_text() + (directory / "middle.crt").read_text())
    return root, full, directory / "leaf.key"
