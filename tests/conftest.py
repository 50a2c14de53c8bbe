"""What holds for every test."""

from __future__ import annotations

import os

# Read by NumPy's OpenBLAS when it is loaded, and inherited by the processes that tests start. Two test files run at a
# time, each with several engines: were each to spin a thread per core, they would mostly wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
