"""A draft worker on another host: with keys it drafts, and what passes on the wire is not readable."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.keys import HostKey, authorize, load_host_key, new_host_key, revoke, write_host_key
from tests.pipeline.fleet import Fleet, Process, running_fleet

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(300)]

TARGET = ("verifier.engine.engine=numpy", "verifier.engine.n_ctx=512", "router.heartbeat_ms=100", "draft={}")
PROMPT = "def remember_this_marker(value):\n    return value"


class Tap:
    """Passes TCP connections on to a port, and keeps what went over the wire."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.seen += data
                sink.sendall(data)
        except OSError:
            pass
        sink.close()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, HostKey]]:
    """The key directories of a target host and of a draft host that know each other."""
    made: dict[str, tuple[Path, HostKey]] = {}
    for name in ("target", "draft"):
        made[name] = tmp_path_factory.mktemp(name), new_host_key(name)
        write_host_key(*made[name])
    authorize(made["target"][0], "draft", made["draft"][1].public, ["draft"])
    authorize(made["draft"][0], "target", made["target"][1].public, ["server"])
    return made


def fleet_on(port: int, keys: Path) -> tuple[str, ...]:
    return (*TARGET, f"endpoints.drafts=tcp://127.0.0.1:{port}", f"network.keys={json.dumps(str(keys))}")


@pytest.fixture(scope="module")
def fleet(hosts: dict[str, tuple[Path, HostKey]]) -> Iterator[Fleet]:
    with running_fleet(*fleet_on(free_port(), hosts["target"][0])) as running:
        yield running


def drafted(fleet: Fleet, tap: Tap, keys: Path) -> tuple[bytes, tuple[int, ...], int]:
    """What passed the tap during a generation, the tokens, and how many proposals were accepted."""
    worker = fleet.start_draft(
        "far",
        "draft.far.engine.threads=1",
        f"endpoints.drafts=tcp://127.0.0.1:{tap.port}",
        f"network.keys={json.dumps(str(keys))}",
    )
    completion = fleet.complete(PROMPT, temperature=0.0, draft="far")
    worker.stop()
    return bytes(tap.seen), completion.tokens, completion.final["timings"]["draft_n_accepted"]


def readable(fleet: Fleet, seen: bytes, tokens: tuple[int, ...]) -> list[str]:
    """What of a generation can be read in bytes: the prompt's ids as they travel, or the answer's text or ids."""
    prompt = np.array(fleet.gateway.post("/tokenize", {"content": PROMPT})["tokens"], np.int32)
    found = ["prompt ids"] if prompt.tobytes() in seen else []
    found += ["answer ids"] if np.array(tokens[:4], np.int32).tobytes() in seen else []
    found += ["marker"] if b"remember_this_marker" in seen else []
    found += ["names"] if b"coupled" in seen else []
    return found


def test_with_keys_nothing_can_be_read_on_the_wire(fleet: Fleet, hosts: dict[str, tuple[Path, HostKey]]) -> None:
    """The draft host's proposals are used, and neither prompt nor answer nor a name is in the bytes that passed."""
    plain = fleet.complete(PROMPT, temperature=0.0, draft="none")
    tap = Tap(int(fleet.settings.endpoints.drafts.rpartition(":")[2]))
    seen, tokens, n_accepted = drafted(fleet, tap, hosts["draft"][0])
    tap.close()
    assert tokens == plain.tokens
    assert n_accepted > 0
    assert len(seen) > 1000
    assert readable(fleet, seen, tokens) == []


def test_without_keys_it_can_be_read(tmp_path: Path) -> None:
    """The same tap on an open connection does find the prompt: so it would have found it above."""
    with running_fleet(*fleet_on(free_port(), tmp_path)) as fleet:
        tap = Tap(int(fleet.settings.endpoints.drafts.rpartition(":")[2]))
        seen, tokens, n_accepted = drafted(fleet, tap, tmp_path)
        tap.close()
        assert n_accepted > 0
        assert {"prompt ids", "names"} <= set(readable(fleet, seen, tokens))


def test_a_worker_without_a_good_key_is_told_so(fleet: Fleet, tmp_path: Path) -> None:
    """It says in its log what to type on the target host, and once that is done, it drafts without a restart."""
    stranger = new_host_key("stranger")
    target = new_host_key("not-the-target")
    write_host_key(tmp_path, stranger)
    authorize(tmp_path, "target", target.public, ["server"])
    keys = f"network.keys={json.dumps(str(tmp_path))}"
    worker = Process(["service", "draft", "--instance", "odd", *fleet.options("draft.odd.drafter=ngram", keys)])
    assert "does not prove to have the key" in worker.wait_for("refused_by_server")
    worker.stop()
    (tmp_path / "authorized.toml").unlink()
    authorize(tmp_path, "target", fleet_key(fleet), ["server"])
    worker = Process(["service", "draft", "--instance", "odd", *fleet.options("draft.odd.drafter=ngram", keys)])
    line = worker.wait_for("refused_by_server")
    assert f"draftwire keys authorize stranger {stranger.public} --role" in line
    assert fleet.complete(PROMPT, draft="none").final["stop"]
    authorize(fleet.settings.network.key_path, "stranger", stranger.public, ["draft"])
    worker.wait_for("router_connected")
    worker.stop()


def fleet_key(fleet: Fleet) -> str:
    key = load_host_key(fleet.settings.network.key_path)
    assert key is not None
    return key.public


def test_revoking_in_the_middle_changes_no_text(fleet: Fleet, hosts: dict[str, tuple[Path, HostKey]]) -> None:
    """The generation goes on without the worker whose key is revoked while it drafts."""
    plain = fleet.complete(PROMPT, temperature=0.0, draft="none", n_predict=120)
    guest = hosts["draft"][0].parent / "guest"
    key = new_host_key("guest")
    write_host_key(guest, key)
    authorize(guest, "target", fleet_key(fleet), ["server"])
    authorize(hosts["target"][0], "guest", key.public, ["draft"])
    worker = fleet.start_draft("guest", "draft.guest.engine.threads=1", f"network.keys={json.dumps(str(guest))}")
    tokens: list[int] = []
    for event in fleet.stream(PROMPT, temperature=0.0, draft="guest", n_predict=120):
        if not tokens:
            revoke(hosts["target"][0], "guest")
        if not event["stop"]:
            tokens += event["tokens"]
    assert tuple(tokens) == plain.tokens
    worker.wait_for("router_silent")
    worker.stop()
