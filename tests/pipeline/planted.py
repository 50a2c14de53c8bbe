"""The CLI with a defect planted into it: `python -m tests.pipeline.planted DEFECT ARGUMENTS...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from services.gateway.service import Exchange, GatewayService
from services.verifier.stepper import Stepper
from shared.sampling.acceptance import Decision, decide
from tools.cli import main


def accept_a_refused_proposal() -> None:
    """The sampler accepts the first proposal that it should refuse."""

    def wrong(params: Any, history: Any, proposals: Any, *rest: Any) -> Any:
        decision = decide(params, history, proposals, *rest)
        if isinstance(decision, Decision) and decision.n_accepted < len(proposals):
            return Decision(decision.n_accepted + 1, decision.token)
        return decision

    patch("services.sampler.session.decide", wrong).start()


def give_up_on_a_new_sampler() -> None:
    """The verifier ends sessions that a restarted sampler does not know."""
    patch("services.verifier.sampler_client._MAX_RESYNCS", 0).start()


def lose_cancelled_sessions() -> None:
    """The verifier drops a session whose client has gone, and tells nobody."""

    def wrong(stepper: Stepper, session_id: int) -> None:
        session = stepper._running.get(session_id)
        if session is not None:
            stepper._release(session)

    patch.object(Stepper, "_cancel", wrong).start()


def leak_descriptors() -> None:
    """The gateway opens a file for each request, and leaves it open."""
    _at_each_request(lambda: os.open(os.devnull, os.O_RDONLY))


def leak_memory() -> None:
    """The gateway keeps a few megabytes of each request."""
    kept: list[bytes] = []
    _at_each_request(lambda: kept.append(b"x" * (8 << 20)))


def _at_each_request(leak: Callable[[], Any]) -> None:
    log_done = GatewayService._log_done

    def wrong(gateway: GatewayService, exchange: Exchange) -> None:
        leak()
        log_done(gateway, exchange)

    patch.object(GatewayService, "_log_done", wrong).start()


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
    main()
