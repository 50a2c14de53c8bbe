"""Makes log lines in numbers, as `journalctl -o json --all` exports them: a third `request_done`, the rest others.

python tests/tools/journal_sample.py 1000000 > /tmp/million.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

START = 1_767_225_600  # 2026-01-01
DRAFTS = (
    ("", "", "", ""),
    ("Ling-flash-2.0-IQ1_KT.gguf", "IQ1_KT", "cuda", "gpu"),
    ("Ling-flash-2.0-IQ2_KL.gguf", "IQ2_KL", "cuda", "gpu2"),
    ("", "", "ngram", "lookup"),
)
TARGET = ("Ling-1T-smol-IQ4_KSS-00001-of-00012.gguf", "IQ4_KSS", "ik")


def request_done(number: int, chance: random.Random, at: float) -> dict[str, Any]:
    """The fields of one line, as the gateway writes them."""
    model, quant, engine, worker = DRAFTS[number % len(DRAFTS)]
    failed = number % 97 == 0
    tokens = 0 if failed else chance.randint(16, 600)
    speed = chance.gauss(7.0 if worker else 6.27, 0.4)
    depths: list[dict[str, int]] = []
    reached = tokens // 3 if worker else 0
    for depth in range(1, 9 if reached else 1):
        kept = sum(chance.random() < 0.8 for _ in range(reached))
        depths.append({"depth": depth, "draft_n": reached, "draft_n_accepted": kept})
        reached = kept
    proposed, accepted = (sum(row[name] for row in depths) for name in ("draft_n", "draft_n_accepted"))
    measured = {
        "cache_n": 0, "prompt_n": 900, "prompt_ms": 4100.5, "prompt_per_token_ms": 4.556111,
        "prompt_per_second": 219.485429, "predicted_n": tokens, "predicted_ms": round(1000 * tokens / speed, 3),
        "predicted_per_token_ms": round(1000 / speed, 6), "predicted_per_second": round(speed, 6) if tokens else 0.0,
        "draft_n": proposed, "draft_n_accepted": accepted,
    }  # fmt: skip
    stages = ("queue", "draft_prefill", "draft_decode", "target_prefill", "verify", "sample", "wire", "wait")
    return {
        "service": "gateway", "instance": "gateway", "pid": 4242, "request": f"cmpl-{number:032x}",
        "endpoint": "/v1/chat/completions", "status": 502 if failed else 200, "finish": "error" if failed else "eos",
        "code": "verifier_lost" if failed else "", "seed": chance.getrandbits(32), "n_prompt": 900,
        "total_ms": round(4200 + 1000 * tokens / speed, 3), **measured, "draft_by_depth": depths,
        "rounds": tokens // 3, "acceptance_rate": round(accepted / proposed, 6) if proposed else 0.0,
        "mean_acceptance_length": 3.0, "stages_ms": dict.fromkeys(stages, 12.345), "worker": worker,
        "worker_changes": 0, "full_rows": 0, "n_drafted": proposed + 9, "n_stale": 2,
        "session": f"{chance.getrandbits(63):016x}",
        "target_model": TARGET[0], "target_quant": TARGET[1], "target_engine": TARGET[2],
        "draft_model": model, "draft_quant": quant, "draft_engine": engine,
        "chunk": json.dumps({"timings": measured}, separators=(",", ":")),
        "event": "request_done", "level": "info", "time": _iso(at),
    }  # fmt: skip


def other(number: int, at: float) -> dict[str, Any]:
    return {
        "service": "router", "instance": "router", "pid": 4243, "session": number, "worker": "gpu",
        "previous": "gpu2", "why": "61 % faster: 21.3 tokens/s instead of 13.2", "event": "draft_moved",
        "level": "info", "time": _iso(at),
    }  # fmt: skip


def entry(fields: dict[str, Any], at: float) -> str:
    """A line of `journalctl -o json` with what Draftwire logged in it."""
    micros = int(at * 1e6)
    return json.dumps(
        {
            "__CURSOR": f"s=11;i={micros:x};b=22;m=33;t=44;x=55",
            "__REALTIME_TIMESTAMP": str(micros), "__MONOTONIC_TIMESTAMP": "1234567", "_BOOT_ID": "0" * 32,
            "PRIORITY": "6", "SYSLOG_IDENTIFIER": f"draftwire-{fields['service']}", "_HOSTNAME": "box",
            "_SYSTEMD_UNIT": f"draftwire-{fields['service']}.service", "MESSAGE": json.dumps(fields),
        },
        separators=(",", ":"),
    )  # fmt: skip


def lines(n: int, seed: int = 0) -> Iterator[str]:
    """So many lines over a week."""
    chance = random.Random(seed)
    for number in range(n):
        at = START + number * 7 * 86400 / n
        yield entry(request_done(number // 3, chance, at) if number % 3 == 0 else other(number, at), at)


def _iso(at: float) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


if __name__ == "__main__":
    for line in lines(int(sys.argv[1])):
        print(line)
