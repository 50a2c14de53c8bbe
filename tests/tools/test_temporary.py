"""Fleets for a while."""

from __future__ import annotations

from shared.settings import load_settings
from tools.fleet import open_gateway
from tools.temporary import temporary_fleet


def test_a_fleet_for_a_while_wants_no_keys_and_no_certificate() -> None:
    """Demo and benchmarks run with the settings of a host that has both, at an address of their own."""
    null = ('verifier.engine.engine="null"', 'draft.model.engine.engine="null"')
    host = ('gateway.host="0.0.0.0"', 'gateway.api_keys="/nowhere"', 'gateway.tls_cert="/no"', 'gateway.tls_key="/no"')
    assert load_settings(None, host).gateway.api_keys == "/nowhere"
    with temporary_fleet(None, [*null, *host]) as settings:
        gateway = open_gateway(settings, 30)
        assert gateway.url.startswith("http://127.0.0.1:")
        assert gateway.post("/tokenize", {"content": "a"})["tokens"]
