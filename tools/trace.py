"""`draftwire trace`: what every process did for one generation, on one clock, as Chrome's trace events.

The clock is the router's. Where a process reads the same clock (one boot, one time namespace) its times are taken as
they are; elsewhere they are moved by offsets estimated from round trips. Invariant: whoever does not answer, or has
forgotten, is named, and the others are still shown.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import zmq
from rich.console import Console
from rich.table import Table

from shared import wire
from shared.clock import ClockMap, Estimate, RoundTrip, estimate
from shared.errors import DraftwireError, WireError
from shared.messages import GetTrace, Message, Ping, Pong, Trace, TraceSource, TraceSources
from shared.service import version
from shared.settings import Settings
from shared.trace import MARKS
from tools.fleet import dial

MAX_NS = 2**62
_ROUND_TRIPS = 8
_ORDER: Final = ("gateway", "tokenizer", "router", "draft", "verifier", "sampler")
_TRACKS: Final = {
    **dict.fromkeys(
        ("gateway.request", "gateway.read", "gateway.encode", "gateway.first_token", "gateway.detokenize"), "request"
    ),
    "verifier.queue": "queue",
}
"""Stages that last while the thread does other things: they have tracks of their own."""
_ARROWS: Final = {
    "proposal": ("draft.proposal", "router.proposal", "verifier.proposal", "verifier.round"),
    "commit": ("verifier.commit", "router.commit", "draft.commit"),
}

Direct = Literal["tokenizer", "sampler"]


@dataclass(frozen=True, slots=True)
class Moment:
    """A mark on the router's clock. own: it is of the session, not of none."""

    name: str
    track: str
    begin_ns: int
    end_ns: int
    own: bool
    position: int
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One process. clock: in terms of the router's. moments: by their ends. notes: what is not whole, in words."""

    label: str
    trace: Trace
    clock: ClockMap
    same_clock: bool
    moments: tuple[Moment, ...]
    notes: tuple[str, ...] = ()

    @property
    def offset(self) -> Estimate:
        """In the middle of what it recorded."""
        middle = self.moments[len(self.moments) // 2].begin_ns if self.moments else self.trace.now_ns
        return self.clock.at(middle)


@dataclass(frozen=True, slots=True)
class Collected:
    """All of one session. missing: who could not be asked or did not answer, and why."""

    session: int
    parts: tuple[Part, ...]
    missing: tuple[tuple[str, str], ...]


class _Socket:
    """Questions to one service, with a deadline."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        settings: Settings,
        service: Literal["router", "tokenizer", "sampler"],
    ) -> None:
        self._socket = dial(context, settings, service)
        self._service = service

    def send(self, message: Message) -> None:
        self._socket.send_multipart(wire.encode(message))

    def receive(self, deadline: float) -> Message | None:
        """Errors: `DraftwireError`: what comes cannot be read."""
        if not self._socket.poll(max(0, round((deadline - time.monotonic()) * 1000))):
            return None
        try:
            return wire.decode(self._socket.recv_multipart())
        except WireError as error:
            raise DraftwireError(f"the {self._service}'s answer cannot be read: {error}", code=error.code) from None

    def clock(self, timeout_s: float) -> Estimate | None:
        """The service's clock in terms of ours; None: it does not answer."""
        trips: list[RoundTrip] = []
        deadline = time.monotonic() + timeout_s
        for _ in range(_ROUND_TRIPS):
            self.send(Ping(time.monotonic_ns()))
            answer = self.receive(deadline)
            received_ns = time.monotonic_ns()
            if answer is None:
                break
            if isinstance(answer, Pong):
                trips.append(RoundTrip(answer.sent_ns, answer.clock_ns, received_ns))
        return estimate(trips)

    def close(self) -> None:
        self._socket.close()


@dataclass(slots=True)
class _Answers:
    """What has come so far. router: its clock in terms of ours."""

    session: int = 0
    router: Estimate = field(default_factory=lambda: Estimate(0, 0, 0))
    clock_id: str = ""
    parts: list[Part] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def collect(settings: Settings, session: int, timeout_s: float = 5.0) -> Collected:
    """Ask everybody; session 0: the one opened last.

    Args:
        timeout_s: for the router's first answer, and then for each of those that are asked.

    Raises:
        DraftwireError: no router answers, nobody knows the session, or nothing of it is recorded any more.
    """
    found = _Answers()
    with zmq.Context() as context:
        _ask_router(context, settings, session, timeout_s, found)
        since_ns, until_ns = _time_of(found.parts)
        for service in ("tokenizer", "sampler"):
            number = 0 if service == "tokenizer" else found.session
            _ask_directly(context, settings, service, number, (since_ns, until_ns), timeout_s, found)
    if not any(moment.own for part in found.parts for moment in part.moments):
        raise DraftwireError(
            f"nothing is recorded any more of session {found.session:016x}",
            "each process keeps its last 65,536 marks, until it ends: trace sooner",
            "unknown_session",
        )
    parts = sorted(found.parts, key=lambda part: (_ORDER.index(part.trace.role), part.label))
    return Collected(found.session, tuple(_noted(part, since_ns) for part in parts), tuple(found.missing))


def _ask_router(
    context: zmq.Context[zmq.Socket[bytes]], settings: Settings, session: int, timeout_s: float, found: _Answers
) -> None:
    """The router, and through it those that worked on the session."""
    router = _Socket(context, settings, "router")
    try:
        clock = router.clock(timeout_s)
        if clock is None:
            raise DraftwireError(
                f"no router answers at {settings.endpoint('router')}", "is the fleet up? `draftwire up`", "no_router"
            )
        found.router = clock
        router.send(GetTrace(random.getrandbits(63), session))
        traces: list[Trace] = []
        sources: TraceSources | None = None
        deadline = time.monotonic() + timeout_s
        while sources is None or len(traces) < sum(not source.missing for source in sources.sources):
            message = router.receive(deadline)
            if message is None:
                break
            if isinstance(message, TraceSources):
                sources = message
                deadline = time.monotonic() + timeout_s
            elif isinstance(message, Trace):
                traces.append(message)
    finally:
        router.close()
    if sources is None:
        raise DraftwireError("the router does not say who worked on the session", "see its log", "no_router")
    if not sources.sources:
        what = f"session {session:016x} is not known" if session else "there has been no session yet"
        raise DraftwireError(
            what,
            "the router knows those in progress and the last 256, until it is restarted; request_done logs their ids",
            "unknown_session",
        )
    found.session = sources.session
    by_name = {(trace.role, trace.instance): trace for trace in traces}
    own = by_name.get((sources.sources[0].role, sources.sources[0].instance))
    found.clock_id = own.clock if own is not None else ""
    for source in sources.sources:
        trace = by_name.get((source.role, source.instance))
        if source.missing or trace is None:
            found.missing.append((_label(source), source.missing or f"it did not answer in {timeout_s:g} s"))
            continue
        estimates = [Estimate(e.at_ns, e.offset_ns, e.uncertainty_ns) for e in source.clock]
        if estimates or source.role == "router" or trace.clock == found.clock_id != "":
            found.parts.append(_part(trace, estimates, found.clock_id))
        else:
            found.missing.append((_label(source), "its clock has not been compared with the router's yet"))


def _ask_directly(
    context: zmq.Context[zmq.Socket[bytes]],
    settings: Settings,
    service: Direct,
    number: int,
    time_ns: tuple[int, int],
    timeout_s: float,
    found: _Answers,
) -> None:
    """A service that the router does not know. time_ns: of the session, by the router's clock."""
    sock = _Socket(context, settings, service)
    try:
        ours = sock.clock(timeout_s)
        if ours is None:
            reason = f"it does not answer at {settings.endpoint(service)}"
            found.missing.append((service, reason))
            return
        offset = ours.offset_ns - found.router.offset_ns
        uncertainty = ours.uncertainty_ns + found.router.uncertainty_ns
        estimated = Estimate(ours.at_ns + found.router.offset_ns, offset, uncertainty)
        since_ns, until_ns = (max(1, time_ns[0] + offset - uncertainty), max(1, time_ns[1] + offset + uncertainty))
        sock.send(GetTrace(random.getrandbits(63), number, since_ns, until_ns))
        deadline = time.monotonic() + timeout_s
        while (message := sock.receive(deadline)) is not None:
            if isinstance(message, Trace):
                found.parts.append(_part(replace(message, role=service), [estimated], found.clock_id))
                return
        found.missing.append((service, f"it did not answer in {timeout_s:g} s"))
    finally:
        sock.close()


def _label(source: TraceSource | Trace) -> str:
    """As it is shown: draft workers by their names."""
    return _shown(source.role if source.instance in ("", source.role) else f"{source.role} {source.instance}")


def _shown(name: str) -> str:
    """What another host says of itself, for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _title(part: Part) -> str:
    return f"{part.label} ({part.trace.pid} on {_shown(part.trace.host)})"


def _part(trace: Trace, estimates: Sequence[Estimate], clock_id: str) -> Part:
    """Its marks on the router's clock; those that make no sense (a worker may send anything) are left out."""
    same = trace.role == "router" or trace.clock == clock_id != ""
    clock = ClockMap(() if same else estimates)
    moments: list[Moment] = []
    n_bad = 0
    for begin, duration, kind, thread, own, position, *numbers in trace.marks.tolist() if _shaped(trace) else ():
        known = 0 <= kind < len(trace.kinds) and 0 <= thread < len(trace.threads)
        name = trace.kinds[kind] if known else ""
        if not name.startswith(f"{trace.role}.") or not (0 <= begin <= MAX_NS and 0 <= duration <= MAX_NS):
            n_bad += 1
            continue
        track = _TRACKS.get(name, trace.threads[thread])
        ours = clock.ours(begin)
        end = max(ours, clock.ours(begin + duration))
        moments.append(Moment(name, track, ours, end, bool(own), position, tuple(numbers)))
    notes = [f"{n_bad} marks make no sense"] if n_bad or not _shaped(trace) else []
    return Part(_label(trace), trace, clock, same, tuple(moments), tuple(notes))


def _shaped(trace: Trace) -> bool:
    return bool(trace.marks.shape[1] == 9)


def _time_of(parts: Iterable[Part]) -> tuple[int, int]:
    """From the first to the last of what is the session's own; now, where nothing is."""
    own = [moment for part in parts for moment in part.moments if moment.own]
    now = time.monotonic_ns()
    return min((m.begin_ns for m in own), default=now), max((m.end_ns for m in own), default=now)


def _noted(part: Part, since_ns: int) -> Part:
    """With what it no longer has."""
    notes = list(part.notes)
    overwritten = part.trace.oldest_ns and part.clock.ours(part.trace.oldest_ns) > since_ns
    if part.trace.n_cut:
        notes.append(f"its {part.trace.n_cut} oldest marks did not fit into the answer")
    if overwritten:
        notes.append("its oldest marks were overwritten")
    elif part.trace.role != "tokenizer" and not any(moment.own for moment in part.moments):
        notes.append("it has recorded nothing of the session: restarted since?")
    return replace(part, notes=tuple(notes))


def trace_json(collected: Collected) -> dict[str, Any]:
    """In Chrome's Trace Event Format, the JSON object form; times in microseconds from the session's first mark."""
    zero_ns, _ = _time_of(collected.parts)
    events: list[dict[str, Any]] = []
    places: dict[int, tuple[int, int]] = {}  # process and track of a moment, by its identity
    for pid, part in enumerate(collected.parts, 1):
        events.append(_metadata(pid, 0, "process_name", {"name": _title(part)}))
        events.append(_metadata(pid, 0, "process_sort_index", {"sort_index": pid}))
        tracks = {track: tid for tid, track in enumerate(sorted({m.track for m in part.moments}), 1)}
        for track, tid in tracks.items():
            events.append(_metadata(pid, tid, "thread_name", {"name": track}))
        for moment in sorted(part.moments, key=lambda m: (m.begin_ns, -m.end_ns)):
            places[id(moment)] = pid, tracks[moment.track]
            events.append(_event(moment, pid, tracks[moment.track], zero_ns))
    for number, (kind, moments) in enumerate(arrows(collected.parts), 1):
        for index, moment in enumerate(moments):
            pid, tid = places[id(moment)]
            ends = index in (0, len(moments) - 1)
            phase = ("s" if index == 0 else "f") if ends else "t"
            event = {"ph": phase, "name": kind, "cat": "arrow", "id": number, "pid": pid, "tid": tid}
            event["ts"] = (moment.begin_ns - zero_ns) / 1000
            if phase == "f":
                event["bp"] = "e"
            events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": _about(collected, zero_ns)}


def _metadata(pid: int, tid: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _event(moment: Moment, pid: int, tid: int, zero_ns: int) -> dict[str, Any]:
    category, _, stage = moment.name.rpartition(".")
    args = dict(zip(MARKS.get(moment.name, ("a", "b", "c")), moment.numbers, strict=False))
    if moment.own:
        args = {"position": moment.position, **args}
    event: dict[str, Any] = {"name": stage, "cat": category, "pid": pid, "tid": tid, "args": args}
    event["ts"] = (moment.begin_ns - zero_ns) / 1000
    if moment.end_ns > moment.begin_ns:
        event |= {"ph": "X", "dur": (moment.end_ns - moment.begin_ns) / 1000}
    else:
        event |= {"ph": "i", "s": "t"}
    return event


def _about(collected: Collected, zero_ns: int) -> dict[str, Any]:
    """What the picture is of, and how far it can be trusted."""
    return {
        "session": f"{collected.session:016x}",
        "version": version(),
        "clock": "the router's monotonic clock",
        "zero_ns": zero_ns,
        "processes": [
            {
                "name": part.label,
                "pid": part.trace.pid,
                "host": part.trace.host,
                "marks": len(part.moments),
                "same_clock": part.same_clock,
                "offset_us": part.offset.offset_ns / 1000,
                "uncertainty_us": part.offset.uncertainty_ns / 1000,
                "notes": list(part.notes),
            }
            for part in collected.parts
        ],
        "missing": [{"name": name, "reason": reason} for name, reason in collected.missing],
    }


def arrows(parts: Sequence[Part]) -> list[tuple[str, list[Moment]]]:
    """What led to what: from each proposal to the step that verified it, from each commit to the draft worker."""
    by_name: dict[str, list[Moment]] = defaultdict(list)
    slack_ns = 0
    for part in parts:
        slack_ns = max(slack_ns, part.offset.uncertainty_ns)
        for moment in part.moments:
            if moment.own:
                by_name[moment.name].append(moment)
    for moments in by_name.values():
        moments.sort(key=lambda m: m.begin_ns)
    found: list[tuple[str, list[Moment]]] = []
    for kind, names in _ARROWS.items():
        hops = names[:-1] if kind == "proposal" else names
        following = [_followed(by_name[a], by_name[b], slack_ns) for a, b in itertools.pairwise(hops)]
        if kind == "proposal":
            following.append(_verified(by_name["verifier.proposal"], by_name["verifier.round"]))
        for moment in by_name[names[0]]:
            path = [moment]
            for step in following:
                if (after := step.get(id(path[-1]))) is None:
                    break
                path.append(after)
            if len(path) > 1:
                found.append((kind, path))
    return found


def _followed(sent: Sequence[Moment], arrived: Sequence[Moment], slack_ns: int) -> dict[int, Moment]:
    """Which arrival each message has, in the order of sending: the first of the same tokens that is not too early."""
    waiting: dict[tuple[int, int], list[Moment]] = defaultdict(list)
    for moment in arrived:
        waiting[moment.position, moment.numbers[0]].append(moment)
    found: dict[int, Moment] = {}
    for moment in sent:
        queue = waiting[moment.position, moment.numbers[0]]
        while queue and queue[0].begin_ns < moment.begin_ns - slack_ns:
            queue.pop(0)
        if queue:
            found[id(moment)] = queue.pop(0)
    return found


def _verified(proposals: Sequence[Moment], rounds: Sequence[Moment]) -> dict[int, Moment]:
    """The first round that verified a token of a proposal: of those that cover a position, the last that came."""
    latest: dict[int, Moment] = {}
    found: dict[int, Moment] = {}
    coming = iter([*proposals, None])
    proposal = next(coming)
    for step in rounds:
        while proposal is not None and proposal.begin_ns <= step.begin_ns:
            for position in range(proposal.position, proposal.position + proposal.numbers[0]):
                latest[position] = proposal
            proposal = next(coming)
        for position in range(step.position, step.position + step.numbers[0]):
            if position in latest:
                found.setdefault(id(latest[position]), step)
    return found


def print_collected(collected: Collected, console: Console) -> None:
    """Who is in it, and how well the clocks are known."""
    table = Table(title=f"Session {collected.session:016x}")
    table.add_column("process")
    for name in ("marks", "clock is ahead by", "+-"):
        table.add_column(name, justify="right")
    table.add_column("not whole")
    for part in collected.parts:
        offset = part.offset
        ahead = "the same clock" if part.same_clock else f"{offset.offset_ns / 1e9:,.6f} s"
        table.add_row(
            _title(part),
            str(len(part.moments)),
            "" if part.trace.role == "router" else ahead,
            "" if part.same_clock else f"{offset.uncertainty_ns / 1000:,.0f} us",
            "; ".join(part.notes),
        )
    for name, reason in collected.missing:
        table.add_row(name, "missing", "", "", reason)
    console.print(table)
