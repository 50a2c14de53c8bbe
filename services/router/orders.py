"""What operators have ordered about draft workers, by the workers' names, kept in a file of the run directory.

Invariants: at most one order a worker, and at most one worker is pinned; a file that cannot be read counts as no
orders, and never keeps the router from starting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

from shared.files import replace_file
from shared.messages import Order

FILE = "orders.json"
"""In the run directory: {"version": 1, "orders": {NAME: "drain" | "ban" | "pin"}}."""

MOST = 1024
_VERSION = 1
_MAX_NAME = 200
_MAX_BYTES = 1 << 20


def parse_orders(text: str) -> dict[str, Order]:
    """The file's orders by worker. Errors: `ValueError` says what is wrong with it."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(value, dict) or value.get("version") != _VERSION:
        raise ValueError(f"it is no file of version {_VERSION}")
    orders = value.get("orders")
    if not isinstance(orders, dict) or len(orders) > MOST:
        raise ValueError(f"its orders are no table of at most {MOST}")
    known = [order for order in get_args(Order) if order]
    for name, order in orders.items():
        if len(name) > _MAX_NAME or order not in known:
            raise ValueError(f"the order about {name[:40]!r} is none of {', '.join(known)}")
    if list(orders.values()).count("pin") > 1:
        raise ValueError("more than one worker is pinned")
    return cast("dict[str, Order]", orders)


class Orders:
    """See the module's docstring.

    Attributes:
        warning: why the file was ignored, or empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._orders: dict[str, Order] = {}
        self.warning = ""
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
            if len(raw) > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES} bytes")
            self._orders = parse_orders(raw.decode("utf-8"))
        except FileNotFoundError:
            pass
        except OSError as error:
            self.warning = error.strerror or type(error).__name__
        except ValueError as error:
            self.warning = str(error)

    def __iter__(self) -> Iterator[str]:
        """The workers that there are orders about."""
        return iter(self._orders)

    def __len__(self) -> int:
        return len(self._orders)

    def of(self, worker: str) -> Order:
        return self._orders.get(worker, "")

    @property
    def pinned(self) -> str:
        """The worker that new sessions go to, or empty."""
        return next((name for name, order in self._orders.items() if order == "pin"), "")

    def give(self, worker: str, order: Order) -> str:
        """Order something about a worker, or nothing any more; why the file could not be written, or empty."""
        self._orders.pop(worker, None)
        if order == "pin":
            self._orders = {name: other for name, other in self._orders.items() if other != "pin"}
        if order:
            self._orders[worker] = order
        return self._save()

    def _save(self) -> str:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            text = json.dumps({"version": _VERSION, "orders": self._orders})
            replace_file(self._path, f"{text}\n", 0o600)
        except (OSError, UnicodeError) as error:
            return f"cannot write {self._path}: {getattr(error, 'strerror', None) or error}"
        return ""
