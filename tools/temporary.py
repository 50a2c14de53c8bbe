"""A fleet for the length of a `with` block: in a private run directory that is gone afterwards."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared.errors import DraftwireError
from shared.settings import Settings, load_settings
from tools.fleet import is_serving
from tools.supervisor import ChildSpec, Command, Supervisor, service_command

PRIVATE_GATEWAY = (
    "gateway.port=0",
    'gateway.host="127.0.0.1"',
    'gateway.api_keys=""',
    'gateway.tls_cert=""',
    'gateway.tls_key=""',
)
"""For a fleet whose only client is whoever has started it."""


def _silent(_line: str) -> None:
    pass


def _elsewhere(command: Command, endpoints: Mapping[str, str]) -> Command:
    """Draft workers, and they alone, look for the router at other endpoints, each at its own."""

    def changed(spec: ChildSpec) -> list[str]:
        more = ["--set", f'endpoints.drafts="{endpoints[spec.instance]}"'] if spec.service == "draft" else []
        return [*command(spec), *more]

    return changed


@contextmanager
def temporary_fleet(
    config: Path | None,
    overrides: Sequence[str],
    *,
    log_dir: Path | None = None,
    drafts_through: Callable[[str, str], str] | None = None,
) -> Iterator[Settings]:
    """Start all services, wait until they serve, and stop them at the end; gives the fleet's settings.

    Args:
        log_dir: where the logs go, to outlive the fleet.
        drafts_through: given a draft worker's name and the router's endpoint, says what it connects to instead.

    Raises:
        DraftwireError: the fleet does not start; the text says why.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="draftwire-"))
    changes = [*overrides, f'run_dir="{run_dir}"', "endpoints={}", *PRIVATE_GATEWAY]
    settings = load_settings(config, changes)
    command = service_command(settings, config, changes)
    if drafts_through is not None:
        endpoint = settings.endpoint("drafts")
        command = _elsewhere(command, {name: drafts_through(name, endpoint) for name in settings.draft})
    started = threading.Event()
    ended = threading.Event()
    failure: list[str] = []
    starting: list[tuple[asyncio.AbstractEventLoop, Supervisor]] = []

    async def live() -> None:
        supervisor = Supervisor(
            settings,
            config,
            changes,
            log_dir=log_dir or run_dir / "logs",
            say=_silent,
            restart=False,
            serving=lambda: is_serving(settings),
            command=command,
        )
        starting.append((asyncio.get_running_loop(), supervisor))
        try:
            await supervisor.start()
            if not await supervisor.ready():
                failure.append(supervisor.failure)
                return
            while not supervisor.failure and not ended.is_set() and not await asyncio.to_thread(is_serving, settings):
                await asyncio.sleep(0.1)
            started.set()
            await asyncio.to_thread(ended.wait)
        except Exception as error:  # whatever it is, the owner must not be given a dead fleet
            failure.append(str(error))
        finally:
            await supervisor.stop()
            started.set()

    thread = threading.Thread(target=lambda: asyncio.run(live()), name="fleet")
    thread.start()
    try:
        started.wait()
        if failure:
            raise DraftwireError(f"the fleet does not start: {failure[0]}", "see `draftwire doctor`")
        yield settings
    finally:
        ended.set()
        if not started.is_set():  # interrupted while it starts
            for loop, supervisor in starting:
                loop.call_soon_threadsafe(supervisor.request_stop)
        thread.join()
        shutil.rmtree(run_dir, ignore_errors=True)
