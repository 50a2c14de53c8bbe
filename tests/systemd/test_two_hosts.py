"""A target host and a draft host, joined by a cable and by keys: two workers there, and what may happen to them."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest

from shared.model.names import resolve_model
from shared.model.vocabulary import Vocabulary
from tests.pipeline.fleet import Completion
from tests.systemd.containers import Host, Rig, in_namespace, until
from tests.systemd.generations import PROMPT, SERVICES, Running, complete, serves, wait_drafting

pytestmark = pytest.mark.timeout(900)

CONFIG = "/etc/draftwire/draftwire.toml"
DRAFTS = "tcp://10.99.0.1:7011"
TARGET_SETTINGS = f"""
run_dir = "/run/draftwire"

[endpoints]
drafts = "{DRAFTS}"

[verifier.engine]
engine = "numpy"
n_ctx = 512
"""
DRAFT_SETTINGS = f"""
[endpoints]
drafts = "{DRAFTS}"

[draft.one.engine]
threads = 1
n_ctx = 512

[draft.two.engine]
threads = 1
n_ctx = 512
"""
WORKERS = ("one", "two")
TARGET_UNITS = [f"draftwire-{name}.service" for name in SERVICES]
DRAFT_UNITS = [f"draftwire-draft@{name}.service" for name in WORKERS]
_ETH_P_ALL = 3


@dataclass(frozen=True)
class Pair:
    """The two hosts. plain: what the target says by itself."""

    target: Host
    drafts: Host
    plain: list[Completion] = field(default_factory=list)

    def wait_serving(self) -> None:
        self.target.wait_active(*TARGET_UNITS)
        until(lambda: serves(self.target), "the gateway to serve")

    def wait_drafting(self) -> None:
        self.drafts.wait_active(*DRAFT_UNITS)
        for worker in WORKERS:
            assert wait_drafting(self.target, worker).tokens == self.plain[0].tokens


@pytest.fixture(scope="module")
def unkeyed(rig: Rig) -> Pair:
    """Both hosts installed, without keys."""
    pair = Pair(rig.host("target", "10.99.0.1"), rig.host("drafts", "10.99.0.2"))
    rig.join(pair.target, pair.drafts)
    pair.target.write(CONFIG, TARGET_SETTINGS)
    pair.drafts.write(CONFIG, DRAFT_SETTINGS)
    pair.target.draftwire("units", "install", "target")
    pair.drafts.draftwire("units", "install", *(f"draft@{name}" for name in WORKERS))
    return pair


def public_key(host: Host) -> str:
    return str(json.loads(host.draftwire("keys", "host", "--json").stdout)["public"])


@pytest.fixture(scope="module")
def pair(unkeyed: Pair) -> Pair:
    """Both hosts with each other's keys, started."""
    for host in (unkeyed.target, unkeyed.drafts):
        host.draftwire("keys", "init", "--name", host.name)
    authorize(unkeyed)
    unkeyed.drafts.draftwire("keys", "authorize", "target", public_key(unkeyed.target), "--role", "server")
    for host, units in ((unkeyed.target, TARGET_UNITS), (unkeyed.drafts, DRAFT_UNITS)):
        host.systemctl("reset-failed")
        host.systemctl("start", "draftwire.target")
        host.wait_active(*units)
    unkeyed.wait_serving()
    unkeyed.plain.append(complete(unkeyed.target, draft="none"))
    return unkeyed


def authorize(pair: Pair) -> None:
    pair.target.draftwire("keys", "authorize", "drafts", public_key(pair.drafts), "--role", "draft")


@pytest.fixture
def ready(pair: Pair) -> Pair:
    """Both hosts, when everything runs and both workers draft."""
    pair.target.systemctl("start", "draftwire.target")
    pair.drafts.systemctl("start", "draftwire.target")
    pair.wait_serving()
    pair.wait_drafting()
    return pair


# --- what passes on the cable -----------------------------------------------------------------------------------------


@contextmanager
def captured(host: Host) -> Iterator[bytearray]:
    """Every byte of every frame at a host's end of the cable, also after the context has ended."""
    sock = in_namespace(host.netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)))
    sock.bind(("lan0", 0))
    sock.settimeout(0.2)
    seen = bytearray()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            with suppress(TimeoutError):
                seen.extend(sock.recv(1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield seen
    finally:
        done.set()
        reader.join()
        sock.close()


def prompt_tokens() -> list[int]:
    return list(Vocabulary.open(resolve_model("embedded:target")).encode(PROMPT, parse_special=False))


def in_clear(tokens: Sequence[int], frames: bytearray) -> bool:
    """Whether a run of tokens stands in what was captured, as an array's bytes."""
    return struct.pack(f"<{len(tokens)}i", *tokens) in frames


def pairs_in_clear(tokens: Sequence[int], frames: bytearray) -> int:
    """How many pairs of neighbours can be read: proposals and commits carry a few tokens each."""
    return sum(in_clear(pair, frames) for pair in itertools.pairwise(tokens))


def test_without_keys_nothing_starts(unkeyed: Pair) -> None:
    """A service with an endpoint that is open to the network refuses to start, and says what to do; others start."""
    for host, unit in ((unkeyed.target, "draftwire-router.service"), (unkeyed.drafts, DRAFT_UNITS[0])):
        host.run("systemctl", "start", unit, check=False)
        until(lambda host=host, unit=unit: host.show(unit, "ActiveState") == "failed", f"{unit} to be refused")
        assert host.show(unit, "ExecMainStatus") == "78"
        assert host.show(unit, "NRestarts") == "0"
        assert any("draftwire keys init" in str(entry.get("MESSAGE")) for entry in host.journal(unit))


def test_without_protection_tokens_are_on_the_cable(unkeyed: Pair) -> None:
    """What the next test looks for can be found: with `insecure`, prompt and text pass in clear, and it warns."""
    hosts = (unkeyed.target, unkeyed.drafts)
    for host in hosts:
        host.write(f"{CONFIG}.d/insecure.toml", "[network]\ninsecure = true\n")
        host.systemctl("reset-failed")
        host.systemctl("start", "draftwire.target")
    unkeyed.wait_serving()
    wait_drafting(unkeyed.target, "one")
    with captured(unkeyed.target) as frames:
        completion = complete(unkeyed.target, draft="one")
    for host, unit in zip(hosts, ("draftwire-router.service", DRAFT_UNITS[0]), strict=True):
        assert any(event["event"] == "insecure_endpoint" for event in host.events(unit))
        host.run("rm", f"{CONFIG}.d/insecure.toml")
        host.systemctl("stop", "draftwire.target", "draftwire-*.service")
    assert in_clear(prompt_tokens(), frames)
    assert pairs_in_clear(completion.tokens, frames) > len(completion.tokens) / 4


def test_with_keys_no_token_is_on_the_cable(ready: Pair) -> None:
    """Thousands of bytes pass for a generation, and neither the prompt's tokens nor the text's are among them."""
    with captured(ready.target) as frames:
        completion = complete(ready.target, draft="one")
    assert completion.final["timings"]["draft_n"] > 0
    assert len(frames) > 2000
    assert not in_clear(prompt_tokens(), frames)
    assert pairs_in_clear(prompt_tokens(), frames) == pairs_in_clear(completion.tokens, frames) == 0
    assert PROMPT.encode() not in frames


# --- what happens to the workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", WORKERS)
def test_workers_elsewhere_change_no_token(ready: Pair, worker: str) -> None:
    completion = complete(ready.target, draft=worker)
    assert completion.tokens == ready.plain[0].tokens
    assert completion.final["timings"]["draft_n"] > 0


def test_the_keys_reach_the_services_that_need_them_alone(ready: Pair) -> None:
    """The secret is readable by root, and by the services with an endpoint on the network."""
    assert ready.target.run("stat", "-c", "%U %a", "/etc/draftwire/keys/host.key").stdout.split() == ["root", "600"]
    holders = {
        unit
        for unit in TARGET_UNITS
        if ready.target.run("test", "-e", f"/run/credentials/{unit}/host.key", check=False).returncode == 0
    }
    assert holders == {"draftwire-router.service"}


def test_a_killed_worker_elsewhere_changes_no_token(ready: Pair) -> None:
    """A generation goes on to the same text while its worker is killed, and the worker comes back by itself."""
    running = Running(ready.target)
    running.reaches(4)
    for unit in DRAFT_UNITS:
        ready.drafts.systemctl("kill", "--signal=KILL", unit)
    running.end()
    assert running.completion is not None, running.error
    assert running.completion.tokens == ready.plain[0].tokens
    ready.wait_drafting()


def test_workers_elsewhere_find_a_router_that_was_killed(ready: Pair) -> None:
    running = Running(ready.target)
    running.reaches(4)
    ready.target.systemctl("kill", "--signal=KILL", "draftwire-router.service")
    running.end()
    assert running.error is not None
    ready.wait_serving()
    ready.wait_drafting()


def test_the_draft_host_reboots_during_a_generation(ready: Pair) -> None:
    """The text is plain decoding's, and after the reboot both workers draft again, with nobody's help."""
    running = Running(ready.target)
    running.reaches(4)
    ready.drafts.reboot()
    running.end()
    assert running.completion is not None, running.error
    assert running.completion.tokens == ready.plain[0].tokens
    ready.wait_drafting()


def test_a_host_that_is_cut_off_comes_back(ready: Pair) -> None:
    """With the cable pulled, generations go on; when it is back, so are the workers."""
    running = Running(ready.target)
    running.reaches(4)
    ready.target.unplug()
    running.end()
    assert running.completion is not None, running.error
    assert running.completion.tokens == ready.plain[0].tokens
    assert complete(ready.target).tokens == ready.plain[0].tokens
    ready.target.plug()
    ready.wait_drafting()


def test_a_revoked_key_drafts_no_more(ready: Pair) -> None:
    """Within seconds its workers are gone, while generations go on; a new key, authorized, brings them back."""
    ready.target.draftwire("keys", "revoke", "drafts")

    def alone() -> bool:
        peers = json.loads(ready.target.draftwire("workers", "--json").stdout)["workers"]
        return not any(peer["state"] == "ok" for peer in peers)

    until(alone, "the workers to be gone")
    assert complete(ready.target).tokens == ready.plain[0].tokens
    until(
        lambda: any(
            event["event"] == "connection_refused" for event in ready.target.events("draftwire-router.service")
        ),
        "the refusal to be logged",
    )
    ready.drafts.draftwire("keys", "init", "--force", "--name", ready.drafts.name)
    ready.drafts.systemctl("restart", "draftwire.target")
    authorize(ready)
    ready.wait_drafting()
