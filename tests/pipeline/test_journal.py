"""What a real fleet logs, as the shell pipelines in the field read it and as `draftwire journal` does."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.errors import DraftwireError
from tests.pipeline.fleet import running_fleet

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(300)]

DRAFTED = r'(?<=draft_n\\":)[0-9]+.*n_accepted\\":[0-9]+'
SPEED = r'(?<=predicted_per_second\\":)[0-9.]+'
"""The scripts' own patterns."""
MOST_BYTES = 48 << 10
"""journald splits longer lines."""
TARGET = {"model": "pymoe-64m-a18m-Q4_K_M.gguf", "quant": "Q4_K_M"}
DRAFTS = {
    "model": {"model": "pymoe-11m-a2m-draft-Q4_K_M.gguf", "quant": "Q4_K_M"},
    "lookup": {"model": "", "quant": "", "engine": "ngram"},
    "none": {"model": "", "quant": "", "engine": ""},
}
EACH = 4


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a fleet that served EACH generations with every draft, and refused one."""
    path = tmp_path_factory.mktemp("log") / "draftwire.log"
    with running_fleet('draft.model.engine.model="embedded:draft"', 'draft.lookup.drafter="ngram"') as fleet:
        fleet.wait_until_serving()
        for n in range(EACH):
            for draft in DRAFTS:
                prompt = "x = [1, 2, 3]\n" * 6 if draft == "lookup" else f"def work_{n}(a, b):"
                fleet.complete(prompt, temperature=0.0 if n % 2 else 0.8, seed=n, draft=draft)
        with pytest.raises(DraftwireError):
            fleet.complete("x", draft="nobody")
    path.write_text("".join(fleet.process.lines))
    return path


def report(path: Path) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "tools.cli", "journal", "report", "--json", "--by", "worker", "--file", str(path)],
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def grep(pattern: str, text: str) -> list[str]:
    """What `grep -Po` finds."""
    found = subprocess.run(["grep", "-Po", pattern], input=text, capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


def test_every_request_says_what_computed_it(log: Path) -> None:
    """Models, quants and engines of both sides, by which the report groups; who was refused is apart."""
    found = report(log)
    drafts = {c["draft"]["engine"] or "none": c for c in found["configurations"]}
    assert len(drafts) == len(found["configurations"]) == 3
    for configuration in drafts.values():
        assert configuration["target"].items() >= TARGET.items()
        assert (configuration["n"], configuration["failed"]) == (EACH, 0)
    engine = found["configurations"][0]["target"]["engine"]
    for name, key in (("model", engine), ("lookup", "ngram"), ("none", "none")):
        assert drafts[key]["draft"].items() >= DRAFTS[name].items()
    assert drafts["none"]["gain"] is None
    assert drafts[engine]["gain"]["n_plain"] == EACH
    assert {part["name"]: part["n"] for part in found["parts"]} == {"": EACH, "lookup": EACH, "model": EACH}
    assert found["lost_by_status"] == {"400": 1}
    assert found["lines"]["bad"] == 0


@pytest.mark.skipif(shutil.which("grep") is None, reason="grep is not installed")
def test_the_pipelines_in_the_field_give_the_numbers_of_the_report(log: Path) -> None:
    """`grep -Po` over the lines of a configuration, and arithmetic of our own: what the report says of it."""
    text = log.read_text()
    for configuration in report(log)["configurations"]:
        draft = configuration["draft"]
        wanted = f'"code": "".*"draft_model": "{draft["model"]}".*"draft_engine": "{draft["engine"]}".*"request_done"'
        lines = "\n".join(line for line in text.splitlines() if re.search(wanted, line))
        pairs = [tuple(map(int, re.findall(r"\d+", match))) for match in grep(DRAFTED, lines)]
        assert len(pairs) == EACH
        shares = [accepted / proposed for proposed, accepted in pairs if proposed]
        speeds = [float(match) for match in grep(SPEED, lines)]
        for values, spread in (
            (shares, configuration["acceptance"]),
            (speeds, configuration["tokens_per_second"]),
        ):
            if not values:
                assert spread is None
                continue
            assert spread["n"] == len(values)
            assert spread["mean"] == pytest.approx(statistics.fmean(values))
            assert spread["median"] == pytest.approx(statistics.median(values))
            assert spread["std"] == pytest.approx(statistics.stdev(values))
            assert (spread["min"], spread["max"]) == (min(values), max(values))
        assert configuration["draft_n"] == sum(proposed for proposed, _ in pairs)
        assert configuration["draft_n_accepted"] == sum(accepted for _, accepted in pairs)


def test_every_field_is_documented(log: Path) -> None:
    """docs/journal.md explains what a line holds, and nothing that it does not."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "journal.md").read_text("utf-8")
    section = page.partition("## One request")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    line = next(line for line in log.read_text().splitlines() if '"request_done"' in line)
    everywhere = {"service", "instance", "pid", "event", "level", "time"}
    assert documented == json.loads(line[line.index("{") :]).keys() - everywhere


def test_lines_are_far_from_being_split(log: Path) -> None:
    """Also with 64 depths, of which each adds less than 100 bytes."""
    longest = max(len(line) for line in log.read_text().splitlines() if "request_done" in line)
    assert longest + 64 * 100 < MOST_BYTES / 4


def test_reading_as_short_lines_of_a_journal_gives_the_same(log: Path, tmp_path: Path) -> None:
    """As `journalctl` prints them by default, and with priorities in front."""
    expected = report(log)["configurations"]
    for prefix in ("Nov 28 09:39:12 box draftwire-gateway[42]: ", "<6>"):
        path = tmp_path / "short.log"
        path.write_text("".join(prefix + line for line in log.read_text().splitlines(keepends=True)))
        assert report(path)["configurations"] == expected
