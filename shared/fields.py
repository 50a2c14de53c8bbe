"""Marks on a message's or setting's fields from which its validation is built (see `shared/wire.py`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive bounds of a number, or of the length of a string, byte string or tuple."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Array:
    """An array field: its dtype, its number of dimensions, and the most elements it may have."""

    dtype: str
    ndim: int
    max_size: int


@dataclass(frozen=True, slots=True)
class Live:
    """A setting that can change while services run."""


LIVE = Live()
