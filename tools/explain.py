"""`draftwire explain`: why a generation's steps verified as many proposals as they did, in words and numbers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from shared.errors import DraftwireError, SettingsError
from shared.messages import Explanation, GetExplanation, StepDecision
from shared.settings import Settings
from tools.fleet import ask_router


def parse_session(text: str) -> int:
    """A session's id as it is printed: hexadecimal.

    Raises:
        SettingsError: it is none.
    """
    try:
        session = int(text, 16)
    except ValueError:
        session = -1
    if not 0 < session < 1 << 64:
        raise SettingsError(
            f"{text!r} is no session", "its 16 digits are in the log line request_done, and in `draftwire workers`"
        )
    return session


def fetch(settings: Settings, session: int) -> Explanation:
    """What the session's verifier says; session 0: the one opened last.

    Raises:
        DraftwireError: no router answers, or nobody knows the session.
    """
    answer: Explanation | None = ask_router(
        settings, GetExplanation(random.getrandbits(63), session), Explanation, timeout_s=5.0
    )
    if answer is None:
        raise DraftwireError(
            f"no router answers at {settings.endpoint('router')}", "is the fleet up? `draftwire up`", "no_router"
        )
    if not answer.decisions:
        what = f"session {answer.session:016x}" if answer.session else "any session"
        raise DraftwireError(
            f"no decisions of {what} are known",
            "a verifier keeps those of the last sessions (16, or two for each slot), until it is restarted",
            "unknown_session",
        )
    return answer


def reason(explanation: Explanation, decision: StepDecision) -> str:
    """Why a step verified so many proposals of the session, and no more."""
    there, length = len(decision.reach), decision.length
    if there == 0:
        return "no proposal was there"
    if length == there:
        return "all that were there" if length < explanation.speculation.n_max else "the limit, n_max"
    if not explanation.adaptive or (length == 0 and there < explanation.speculation.n_min):
        return "fewer than n_min" if there < explanation.speculation.n_min else "the room of a step"
    ms = (decision.further_us - decision.step_us) / 1000
    worth = decision.rate * ms / 1000
    gain = decision.reach[length]
    if gain > worth:
        return f"the next alone would pay ({gain:.2f} tokens in {ms:.1f} ms), but other sessions' pay more, or n_min"
    which = "the next" if length else "the first"
    return f"{which} would bring {gain:.2f} tokens in {ms:.1f} ms, in which {worth:.2f} are made otherwise"


def summary(explanation: Explanation) -> str:
    """All steps in a few sentences."""
    decisions = explanation.decisions
    lengths = Counter(decision.length for decision in decisions)
    verified, accepted = sum(d.length for d in decisions), sum(d.n_accepted for d in decisions)
    waited = sum(d.waited_us for d in decisions) / 1000
    took = sum(d.took_us for d in decisions) / 1000
    bounds = explanation.speculation
    parts = [
        f"Session {explanation.session:016x}, its last {len(decisions)} steps: {verified} proposals verified, "
        f"{accepted} accepted; {took:.0f} ms in steps, {waited:.0f} ms between them, waiting for proposals included.",
        "Proposals a step: " + ", ".join(f"{n} in {count}" for n, count in sorted(lengths.items())) + ".",
    ]
    if explanation.adaptive:
        last = decisions[-1]
        parts.append(
            f"Time was worth {last.rate:.1f} tokens/s at the end, what all sessions reached lately: a proposal is "
            "verified if what it is expected to bring is more than that for the time that its row takes."
        )
    else:
        parts.append('Lengths are not chosen here: verifier.length = "fixed".')
    if (bounds.n_min, bounds.p_min) != (0, 0.0):
        parts.append(f"The request wants at least n_min = {bounds.n_min}, and confidence p_min = {bounds.p_min:g}.")
    return "\n".join(parts)


def print_explanation(explanation: Explanation, steps: int, console: Console) -> None:
    """The summary, and a table of the last steps."""
    console.print(summary(explanation), soft_wrap=True)
    table = Table()
    for name in ("position", "waited ms", "there", "verified", "accepted", "expected", "rows", "ms", "took ms"):
        table.add_column(name, justify="right")
    table.add_column("why no more")
    for decision in explanation.decisions[-steps:]:
        table.add_row(
            str(decision.position),
            f"{decision.waited_us / 1000:.1f}",
            str(len(decision.reach)),
            str(decision.length),
            str(decision.n_accepted),
            f"{sum(decision.reach[: decision.length]):.2f}",
            str(decision.rows),
            f"{decision.step_us / 1000:.1f}",
            f"{decision.took_us / 1000:.1f}",
            reason(explanation, decision),
        )
    console.print(table)


def explanation_json(explanation: Explanation) -> dict[str, object]:
    """With the names of `Explanation` and `StepDecision`; the session as it is printed."""
    return {
        **asdict(explanation),
        "session": f"{explanation.session:016x}",
        "decisions": [{**asdict(d), "reason": reason(explanation, d)} for d in explanation.decisions],
    }
