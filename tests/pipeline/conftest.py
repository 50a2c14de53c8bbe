"""Fixtures of the pipeline tests."""

from __future__ import annotations

import pytest

from shared.model.names import load_prompts

N_PROMPTS = 20


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """The first bundled prompts, cut to a length that the NumPy target computes in a fraction of a second."""
    return [prompt.text[:160] for prompt in load_prompts()[:N_PROMPTS]]
