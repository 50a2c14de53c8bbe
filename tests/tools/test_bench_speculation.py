"""`draftwire bench speculation`: the statistics, what is written, what is refused, and small runs of the real thing."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared import wire
from shared.engine.ngram import NgramIndex
from shared.errors import SettingsError
from shared.messages import Proposal
from shared.model.names import embedded_copy_prompts, load_prompts, resolve_model
from shared.model.vocabulary import Vocabulary
from shared.routing.lookup import LookupFigures
from shared.settings import load_settings
from tools.bench_speculation import BenchOptions, SceneResult, _logged_overruns, run_scenes
from tools.bench_speculation_figures import (
    CSV_COLUMNS,
    Overruns,
    Record,
    Spread,
    csv_rows,
    percentile,
    pooled_depths,
    spread,
    summarize,
)
from tools.bench_speculation_report import (
    Point,
    prepare_output,
    print_scene,
    proposal_bytes,
    save,
    scatter_svg,
    terminal_scatter,
)
from tools.bench_speculation_scenes import (
    PLAIN,
    SUITES,
    Event,
    Policy,
    Prompts,
    Scene,
    drafting_model,
    find_scenes,
    fleet_overrides,
    parse_policy,
    read_prompts,
    scene_settings,
)

ROOT = Path(__file__).resolve().parents[2]


def record(policy: str, prompt: int = 0, **changes: Any) -> Record:
    """A completion of 4 tokens at 2 tokens/s, with what is given instead."""
    values: dict[str, Any] = {
        "scene": "s",
        "policy": policy,
        "turn": prompt,
        "prompt": prompt,
        "repeat": 0,
        "prompt_tokens": (1, 2),
        "tokens": (3, 4, 5, 6),
        "seed": 7,
        "temperature": 0.0,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "acceptance": "coupled",
        "cached_tokens": 0,
        "tokens_per_s": 2.0,
        "ttft_ms": 100.0,
        "intervals_ms": (10.0, 20.0, 30.0),
        "rounds": 3,
        "proposed": 0,
        "accepted": 0,
        "by_depth": (),
        "stale": 0,
        "drafted": 0,
        "worker": "",
        "stages_ms": {"verify": 8.0},
        "turn_busy_s": 2.0,
        "turn_tokens": 4,
    }
    return Record(**(values | changes))


def result(*records: Record, **changes: Any) -> SceneResult:
    values: dict[str, Any] = {
        "scene": Scene("s", "a scene"),
        "time_scale": 1.0,
        "n_prompts": 1,
        "tokens": 4,
        "repeats": 1,
        "target": "numpy",
        "row_invariant": True,
        "records": records,
        "overruns": (),
        "interrupted": False,
        "settings": load_settings(None, [], {}),
    }
    return SceneResult(**(values | changes))


def printed(shown: SceneResult) -> str:
    console = Console(file=io.StringIO(), width=120, markup=False, highlight=False)
    print_scene(shown, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_spread_of_known_values() -> None:
    """Mean, median, sample deviation and extremes; one value has no deviation, none has nothing."""
    assert spread([2.0, 4.0, 4.0, 10.0]) == Spread(4, 5.0, 4.0, statistics.stdev([2, 4, 4, 10]), 2.0, 10.0)
    assert spread([3.0]) == Spread(1, 3.0, 3.0, 0.0, 3.0, 3.0)
    assert spread([]) is None


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.99, 1.0])
def test_percentiles_are_numpys(share: float) -> None:
    """Linear interpolation between the two nearest, whatever the order of the values."""
    values = [5.0, 1.0, 4.0, 2.5, 9.0]
    assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))
    assert percentile([], share) is None


def test_a_policy_is_summed_up() -> None:
    """Speed, acceptance and costs of a policy, against plain decoding of the same prompts."""
    records = [
        record("plain", 0),
        record("plain", 1, tokens_per_s=4.0, turn_busy_s=1.0),
        record(
            "adaptive",
            0,
            tokens_per_s=4.0,
            turn_busy_s=1.0,
            intervals_ms=(50.0,),
            rounds=1,
            proposed=3,
            accepted=2,
            by_depth=((1, 1), (1, 1), (1, 0)),
            stale=6,
            drafted=9,
            turn_wire_bytes=400,
            stages_ms={"verify": 4.0},
        ),
        record(
            "adaptive",
            1,
            tokens=(3, 4, 5, 9),
            tokens_per_s=4.0,
            turn_busy_s=1.0,
            intervals_ms=(60.0, 70.0),
            rounds=2,
            proposed=2,
            accepted=1,
            by_depth=((2, 1),),
            drafted=3,
            turn_wire_bytes=200,
            stages_ms={"verify": 2.0},
        ),
    ]
    plain, adaptive = summarize(records)
    assert (plain.policy, plain.all_tokens_per_s, plain.speed_up, plain.same) == ("plain", 8 / 3, 1.0, 2)
    assert adaptive.tokens_per_s == Spread(2, 4.0, 4.0, 0.0, 4.0, 4.0)
    assert adaptive.all_tokens_per_s == 4.0
    assert adaptive.speed_up == pytest.approx(1.5)
    assert adaptive.speed_ups == spread([2.0, 1.0])
    assert adaptive.itl_p50_ms == 60.0
    assert adaptive.acceptance_rate == pytest.approx(3 / 5)
    assert adaptive.by_depth == ((3, 2), (1, 1), (1, 0))
    assert adaptive.mean_acceptance_length == 2.0  # 6 tokens of rounds in 3 rounds
    assert adaptive.rows_per_token == pytest.approx(8 / 6)
    assert adaptive.wasted_per_token == pytest.approx(2 / 6)
    assert adaptive.stale_per_token == 1.0
    assert adaptive.drafted_per_token == 2.0
    assert adaptive.wire_bytes_per_token == 75.0
    assert adaptive.stages_ms_per_token["verify"] == 0.75
    assert (adaptive.same, adaptive.compared) == (1, 2)


def test_completions_beside_each_other_count_as_one_turn() -> None:
    """With several at a time the speed is that of all together, and the turn's time and bytes count once."""
    both = {"turn": 0, "turn_busy_s": 4.0, "turn_tokens": 8, "turn_wire_bytes": 800}
    [summary] = summarize([record("plain", 0, **both), record("plain", 1, **both)])
    assert summary.all_tokens_per_s == 2.0
    assert summary.wire_bytes_per_token == 100.0


def test_what_cannot_be_told_is_not_made_up() -> None:
    """A single token has no speed, no proposals have no rate, and rejection promises no text."""
    one = record("adaptive+rejection", tokens=(3,), tokens_per_s=0.0, turn_busy_s=0.0, rounds=0, intervals_ms=())
    one = replace(one, acceptance="rejection", temperature=0.7)
    _, summary = summarize([record("plain"), one])
    assert (summary.tokens_per_s, summary.speed_up, summary.speed_ups) == (None, None, None)
    assert (summary.acceptance_rate, summary.rows_per_token, summary.itl_p99_ms) == (None, None, None)
    assert summary.same is None


def test_depths_of_different_length_are_pooled() -> None:
    """A run that went deeper adds depths."""
    records = [record("a", by_depth=((2, 1),)), record("a", by_depth=((4, 3), (3, 3)))]
    assert pooled_depths(records) == ((6, 4), (3, 3))


# --- what is shown and written ----------------------------------------------------------------------------------------


def test_csv_has_a_line_for_each_completion() -> None:
    """Columns in their order, each completion beside plain's of the same scene, and no cell that says None."""
    rows = csv_rows([record("plain"), record("fixed:4", tokens=(3,), tokens_per_s=3.0), record("fixed:4", 5)])
    assert [tuple(row) for row in rows] == [CSV_COLUMNS] * 3
    assert (rows[1]["speed_up"], rows[1]["same_as_plain"], rows[1]["n_tokens"]) == (1.5, False, 1)
    assert (rows[2]["speed_up"], rows[2]["same_as_plain"], rows[2]["turn_wire_bytes"]) == ("", "", "")
    assert (rows[0]["verify_ms"], rows[0]["itl_p50_ms"]) == (8.0, 20.0)


def test_files_hold_all_that_was_measured(tmp_path: Path) -> None:
    """results.json has what a recorder needs to run a completion again; the others are readable by their formats."""
    prepare_output(tmp_path / "out")
    save([result(record("plain"), record("adaptive", proposed=4, accepted=3))], tmp_path / "out")
    [scene] = json.loads((tmp_path / "out" / "results.json").read_text())["scenes"]
    _, found = scene["records"]
    assert (found["prompt_tokens"], found["tokens"], found["seed"]) == ([1, 2], [3, 4, 5, 6], 7)
    assert {"temperature", "top_k", "top_p", "min_p", "acceptance", "intervals_ms", "stages_ms"} <= set(found)
    assert [policy["policy"] for policy in scene["policies"]] == ["plain", "adaptive"]
    assert scene["policies"][1]["acceptance_rate"] == 0.75
    lines = list(csv.DictReader((tmp_path / "out" / "completions.csv").read_text().splitlines()))
    assert [line["policy"] for line in lines] == ["plain", "adaptive"]
    assert ET.parse(tmp_path / "out" / "scatter.svg").getroot().tag.endswith("svg")


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    """A file where the folder should be is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot write to .*file"):
        prepare_output(tmp_path / "file")


def test_scatter_plots_show_every_policy() -> None:
    """The fastest completion is at the top, full acceptance at the right, and policies have marks of their own."""
    points = [Point("a & b", 0.0, 5.0), Point("c", 1.0, 10.0)]
    lines = terminal_scatter(points, width=11, height=3)
    assert lines[1:4] == ["   10.00 │          ▲", "         │●          ", "    0.00 │           "]
    assert lines[-1] == "● a & b  ▲ c"
    root = ET.fromstring(scatter_svg([("x < y", points), ("empty", [])]))
    assert len(root.findall(".//{*}circle")) == 4  # two points and the legend's
    assert "x < y" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_texts_that_differ_are_a_defect_where_the_engine_promises_equal_ones() -> None:
    """With row invariance a difference is shouted, without it explained, and equality is said."""
    different = (record("plain"), record("fixed:4", tokens=(3, 4, 5, 8)))
    assert "0 of 1 texts are plain decoding's, THOUGH THE ENGINE PROMISES ALL" in printed(result(*different))
    assert "near-ties of this engine" in printed(result(*different, row_invariant=False))
    assert "fixed:4: all 1 texts are plain decoding's" in printed(result(record("plain"), record("fixed:4")))


def test_overruns_are_shouted() -> None:
    """Who was late, how often and by how much; nothing where nobody was."""
    found = (Overruns("verifier of plain", 100, 3, 41.5), Overruns("draft-model of adaptive", 50, 0, 0.0))
    text = printed(result(record("plain"), overruns=found))
    assert "OVERRUNS" in text
    assert "verifier of plain: 3 of 100 passes, by 41.5 ms" in text
    assert "draft-model" not in text
    assert "OVERRUNS" not in printed(result(record("plain"), overruns=found[1:]))


def test_a_scaled_or_interrupted_run_says_so() -> None:
    """Figures of such a run cannot be mistaken for others."""
    text = printed(result(record("plain"), time_scale=0.25, interrupted=True))
    assert "TIME SCALE 0.25" in text
    assert "INTERRUPTED" in text
    assert "Nothing has been measured" in printed(result(interrupted=True))


def test_overruns_are_read_from_logs() -> None:
    """The last word of a process counts, also of one that was killed; lines of other events are skipped."""
    warned = {"event": "slower_than_emulated", "passes": 5, "overruns": 1, "overrun_ms": 2.0}
    ended = {"event": "emulation_ended", "passes": 9, "overruns": 2, "overrun_ms": 3.5}
    lines = ["Traceback", json.dumps({"event": "request_done"}), json.dumps(warned)]
    assert _logged_overruns("\n".join(lines)) == Overruns("", 5, 1, 2.0)
    assert _logged_overruns("\n".join([*lines, json.dumps(ended)])) == Overruns("", 9, 2, 3.5)
    assert _logged_overruns(lines[1]) is None


def test_bytes_of_a_proposal_are_those_of_its_frames() -> None:
    """A distribution costs an id and a probability, 4 bytes each, for every entry, and a coupled proposal none."""
    coupled = Proposal(1 << 60, 1000, (1 << 64) - 1, (5000,), (0.5,), decode_us=10_000)
    assert proposal_bytes(0) == sum(len(frame) for frame in wire.encode(coupled)) < 100
    assert 0 < proposal_bytes(64) - proposal_bytes(0) - 8 * 64 < 10
    assert 0 < proposal_bytes(157_184) - proposal_bytes(0) - 8 * 157_184 < 20


# --- policies, scenes, prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", PLAIN),
        ("adaptive", Policy("adaptive", "adaptive")),
        ("adaptive:8@near", Policy("adaptive:8@near", "adaptive", 8, worker="near")),
        ("fixed:4+rejection", Policy("fixed:4+rejection", "fixed", 4, rejection=True)),
        ("sequential:16:0.75", Policy("sequential:16:0.75", "sequential", 16, 0.75)),
        ("sequential:4:0+greedy", Policy("sequential:4:0+greedy", "sequential", 4, greedy=True)),
    ],
)
def test_policies_by_name(text: str, expected: Policy) -> None:
    """What is written is what is run."""
    assert parse_policy(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "best", "fixed", "fixed:x", "fixed:0", "fixed:65", "sequential:4", "sequential:4:1.5", "adaptive:1:2"),
        *("plain@model", "adaptive@", "adaptive+coupled", "sequential:4:0.5+rejection", "sequential:4:nan"),
        *("adaptive+greedy", "plain+greedy"),
    ],
)
def test_what_is_no_policy_is_named(text: str) -> None:
    """The error quotes it."""
    with pytest.raises(SettingsError) as error:
        parse_policy(text)
    assert repr(text) in str(error.value)


def test_plain_decoding_is_always_measured_and_first() -> None:
    """Listed or not, once."""
    assert [policy.name for policy in Scene("s", "", ("fixed:2", "plain", "fixed:2")).parsed] == ["plain", "fixed:2"]


def test_what_does_not_go_together_is_refused() -> None:
    """Drafting in turn is for one at a time, rejection for sampling."""
    with pytest.raises(SettingsError, match="one prompt at a time"):
        _ = Scene("s", "", ("sequential:4:0.5",), concurrency=2).parsed
    with pytest.raises(SettingsError, match="temperature"):
        _ = Scene("s", "", ("adaptive+rejection",)).parsed
    with pytest.raises(SettingsError, match="temperature"):
        _ = Scene("s", "", ("sequential:4:0.5+greedy",)).parsed


@pytest.mark.parametrize("scene", SUITES["paper"], ids=lambda scene: scene.name)
def test_every_scene_of_the_paper_can_be_run(scene: Scene) -> None:
    """Its policies, profile, workers and changes are valid settings, emulated, with a slot for each generation."""
    settings = scene_settings(scene, 1.0, None, ())
    assert settings.verifier.engine.engine == "emulated"
    assert settings.verifier.engine.n_slots == scene.concurrency
    for policy in scene.parsed:
        built = load_settings(None, fleet_overrides(settings, policy), {})
        assert set(built.draft) == (set() if policy.kind == "plain" else set(scene.drafts))
        assert policy.worker == "auto" or policy.worker in built.draft
        engine = built.verifier.engine
        assert engine.n_batch > engine.n_slots * (built.verifier.n_max + 1)


def test_events_happen_once_each() -> None:
    """Each before one turn, by its share of them; workers are as far away as the scene says, or as all are."""
    scene = Scene("s", "", rtt_ms=1.0, rtts=(("far", 30.0),), events=(Event(0.0, "a", 5.0), Event(0.4, "a", None)))
    assert (scene.rtt_of("far"), scene.rtt_of("a")) == (30.0, 1.0)
    for n_turns in (1, 3, 10):
        found = [event for turn in range(n_turns) for event in scene.events_at(turn, n_turns)]
        assert found == list(scene.events)


@pytest.mark.parametrize("scene", [scene for scene in SUITES["paper"] if scene.events], ids=lambda scene: scene.name)
def test_events_of_the_paper_are_of_its_workers(scene: Scene) -> None:
    """Or nothing would happen."""
    assert {event.worker for event in scene.events} <= set(scene.drafts)
    assert all(scene.events_at(round(event.share * 20), 20) for event in scene.events)


def test_the_router_is_held_against_an_oracle() -> None:
    """Which takes the fastest worker, or none, for each completion; where each worker was measured by itself."""
    busy = {"plain": (2.0, 2.0), "adaptive": (1.0, 2.0), "adaptive@a": (1.0, 4.0), "adaptive@b": (3.0, 1.0)}
    records = [record(name, n, turn_busy_s=s) for name, seconds in busy.items() for n, s in enumerate(seconds)]
    assert "router: 66.7 % of the speed of an oracle" in printed(result(*records))
    assert "50.0 % in the second half. At random 44.4 %, in turn 100.0 %." in printed(result(*records))
    assert "oracle" not in printed(result(*(r for r in records if r.policy != "adaptive@b")))
    slow = [record("plain", turn_busy_s=1.0), *(record(name, turn_busy_s=4.0) for name in list(busy)[1:])]
    assert "router: 25.0 % of the speed of an oracle" in printed(result(*slow))


def test_fleets_differ_by_policy_alone() -> None:
    """What a policy needs is set, and what the user has set is kept."""
    overrides = (
        "verifier.engine.n_ctx=512",
        "draft.far.engine.threads=3",
        'draft.far.engine.override_tensors=["a\\"b"]',
    )
    scene = Scene("s", "", ("fixed:20",), engine="numpy")
    settings = scene_settings(scene, 1.0, None, overrides)
    for name, length, n_max, workers in (("fixed:20", "fixed", 20, {"far"}), ("plain", "adaptive", 16, set())):
        built = load_settings(None, [*overrides, *fleet_overrides(settings, parse_policy(name))], {})
        assert (built.verifier.length, built.verifier.n_max) == (length, n_max)
        assert built.verifier.engine == replace(settings.verifier.engine, n_ctx=512)
        assert set(built.draft) == workers
        if workers:
            assert built.draft["far"] == settings.draft["far"]
            assert built.draft["far"].engine.override_tensors == ('a"b',)
            assert built.draft["far"].engine.threads == 3


def test_time_is_scaled_for_target_and_draft() -> None:
    """Every cost of a pass is multiplied, a pace of the user's own too."""
    scene = Scene("s", "", profile="ling-1t", drafts=("model",), changes=("draft.model.engine.pace.first_row_ms=400",))
    settings = scene_settings(scene, 0.5, None, ())
    target, draft = settings.verifier.engine.pace, settings.draft["model"].engine.pace
    assert (target.first_row_ms, target.further_row_ms, target.prefill_per_second) == (80.0, 31.2, 538.0)
    assert (draft.first_row_ms, draft.further_row_ms, draft.prefill_per_second) == (200.0, 2.5, 1126.0)
    with pytest.raises(SettingsError, match="no engine is emulated"):
        scene_settings(Scene("s", "", engine="numpy"), 0.5, None, ())


def test_workers_are_the_configured_ones_or_a_kind() -> None:
    """A name that is neither is refused, with those that there are; sequential needs one with a model."""
    with pytest.raises(SettingsError, match=r"no draft worker 'fast'.*configured ones: model"):
        scene_settings(Scene("s", "", drafts=("fast",)), 1.0, None, ())
    lookup = scene_settings(Scene("s", "", drafts=("ngram",)), 1.0, None, ())
    assert [worker.drafter for worker in lookup.draft.values()] == ["ngram"]
    with pytest.raises(SettingsError, match="no draft worker is a model"):
        drafting_model(lookup)


def test_scenes_are_found_by_name() -> None:
    """Unknown ones are named, with those that there are."""
    assert [scene.name for scene in find_scenes("paper", ("wire", "greedy"))] == ["wire", "greedy"]
    assert find_scenes("paper", ()) == SUITES["paper"]
    with pytest.raises(SettingsError, match=r"no scene 'x'.*greedy"):
        find_scenes("paper", ("x",))
    with pytest.raises(SettingsError, match="no suite 'x'"):
        find_scenes("x", ())


def test_prompts_from_files(tmp_path: Path) -> None:
    """Lines of a .jsonl are prompts of their own, any other file is one; a number is of the bundled ones."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    scene = Scene("s", "")
    assert read_prompts(str(tmp_path / "a.jsonl")).choose(scene) == ("one", "two")
    assert read_prompts(str(tmp_path / "b.txt")).choose(scene) == ("one\ntwo\n",)
    assert read_prompts("3").choose(scene) == tuple(prompt.text for prompt in load_prompts()[:3])
    copies = load_prompts(embedded_copy_prompts())
    assert read_prompts("3").choose(replace(scene, copies=True)) == tuple(prompt.text for prompt in copies[:3])
    assert Prompts(0, ("one", "two")).choose(replace(scene, concurrency=3)) == ("one", "two", "one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": 3}', r"a\.jsonl:2: no \"prompt\""),
        ("a.jsonl", b"{oh", r"a\.jsonl:1: no JSON"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1"),
        ("a.jsonl", b"\n", "holds no prompts"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff\xff", "not UTF-8"),
        ("a.txt", None, "cannot read the prompts"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    """The file, and in a .jsonl the line."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read_prompts(str(tmp_path / name))
    with pytest.raises(SettingsError, match="at least 1"):
        read_prompts("0")


def test_copy_prompts_end_with_their_own_beginning() -> None:
    """The last tokens have occurred before, so that prompt lookup has something to propose: the router sees a copy."""
    vocabulary = Vocabulary.open(resolve_model("embedded:target"))
    prompts = load_prompts(embedded_copy_prompts())
    assert len(prompts) == 15
    for prompt in prompts:
        index = NgramIndex(5, 5)
        tokens = vocabulary.encode(prompt.text, parse_special=True).tolist()
        index.extend(tokens)
        assert index.propose(8)
        shares = LookupFigures(tokens).shares()
        assert min(shares.coverage, shares.first, shares.further) > 0.7


# --- the real thing ---------------------------------------------------------------------------------------------------

NUMPY = (
    "verifier.engine.inner=numpy",
    "verifier.engine.model=embedded:draft",  # drafted for by itself, of another engine: quick, and mostly agreed with
    "verifier.engine.n_ctx=768",
    "draft.model.engine.n_ctx=768",
    "draft.model.engine.threads=1",
    "verifier.engine.pace.first_row_ms=5",
    "verifier.engine.pace.further_row_ms=1",
    "verifier.engine.pace.prefill_per_second=100000",
)


def draftwire(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTWIRE_")}
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", "bench", "speculation", *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONWARNINGS": "error", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.pipeline
def test_policies_are_measured_side_by_side(tmp_path: Path) -> None:
    """Plain, overlapped and in turn, over a link, of an engine without row effects: the same texts, and all figures."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p.text[:120]}) + "\n" for p in load_prompts()[:2]))
    ended = draftwire(
        *("--engine", "emulated", "--prompts", str(prompts), "--tokens", "12", "--rtt-ms", "2", "-t", "0.7"),
        *("-p", "adaptive", "-p", "fixed:2+rejection", "-p", "sequential:8:0.5"),
        *("--out", str(tmp_path / "out"), "--time-scale", "2"),
        *(part for change in NUMPY for part in ("--set", change)),
        *("--set", "draft.model.engine.pace.first_row_ms=1", "--set", "draft.model.engine.pace.further_row_ms=1"),
        *("--set", "draft.model.engine.pace.prefill_per_second=100000"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "TIME SCALE 2" in ended.stdout
    assert "adaptive: all 2 texts are plain decoding's." in ended.stdout
    [scene] = json.loads((tmp_path / "out" / "results.json").read_text())["scenes"]
    assert scene["row_invariant"]
    assert len(scene["records"]) == 8
    policies = {policy["policy"]: policy for policy in scene["policies"]}
    assert list(policies) == ["plain", "adaptive", "fixed:2+rejection", "sequential:8:0.5"]
    for name, policy in policies.items():
        assert policy["same"] == (None if "rejection" in name else 2)
        assert policy["speed_up"] > 0
        assert policy["tokens_per_s"]["n"] == 2
        # Only what drafts elsewhere has a wire.
        assert (policy["wire_bytes_per_token"] is None) == (name in ("plain", "sequential:8:0.5"))
    for found in scene["records"]:
        assert len(found["tokens"]) == 12
        assert found["accepted"] + found["rounds"] == 11  # each round commits what is accepted and one more
        assert len(found["intervals_ms"]) == found["rounds"]
        assert found["cached_tokens"] == 0
    assert {found["process"] for found in scene["overruns"]} >= {"verifier of plain", "target of sequential:8:0.5"}


@pytest.mark.pipeline
def test_several_completions_at_a_time() -> None:
    """A turn's completions run beside each other in one fleet, and its speed and bytes are those of all."""
    scene = Scene("s", "", ("fixed:4",), engine="null", concurrency=3)
    [shown] = run_scenes([scene], BenchOptions(Prompts(4), tokens=16), Console(file=io.StringIO()))
    assert [(r.policy, r.turn, r.prompt) for r in shown.records] == [
        *(("plain", 0, prompt) for prompt in range(3)),
        *(("fixed:4", 0, prompt) for prompt in range(3)),
        ("plain", 1, 3),
        ("fixed:4", 1, 3),
    ]
    first = [record for record in shown.records if record.policy == "fixed:4" and record.turn == 0]
    assert len({(record.turn_busy_s, record.turn_wire_bytes) for record in first}) == 1
    assert first[0].turn_tokens == 48
    assert first[0].turn_wire_bytes
    assert [summary.same for summary in summarize(shown.records)] == [4, 4]


def _alive(mark: str) -> list[str]:
    """Command lines of processes that name a path."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if mark in line:
            found.append(line)
    return found


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for temporary files, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="dw-") as directory:
        yield Path(directory)


@pytest.mark.pipeline
@pytest.mark.parametrize("concurrency", ["1", "2"])
def test_ctrl_c_leaves_nothing_but_the_figures(temporary: Path, concurrency: str) -> None:
    """In the middle of a run: what there is is printed and written, every process and every file is gone."""
    out = temporary / "out"
    emulated = [f"verifier.engine.pace.{name}" for name in ("first_row_ms=30", "further_row_ms=1")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.cli", "bench", "speculation", "--engine", "emulated", "--draft", "garbage"]
        + ["--prompts", "150", "--tokens", "100", "--concurrency", concurrency, "--out", str(out)]
        + ["--set", "verifier.engine.inner=null", "--set", "verifier.engine.pace.prefill_per_second=100000"]
        + [part for change in emulated for part in ("--set", change)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, and so the whole suite run as one, ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 120
        # The warm-up, and one turn.
        while sum(p.read_text().count('"request_done"') for p in temporary.glob("*logs-*/gateway.log")) < 5:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "INTERRUPTED" in shown
    assert "Speed" in shown
    assert "Traceback" not in errors
    assert json.loads((out / "results.json").read_text())["scenes"][0]["interrupted"]
    assert [path.name for path in temporary.iterdir()] == ["out"]
    assert _alive(str(temporary)) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--policy", "best"), ("'best' is no policy", "sequential:N:P")),
        (("--profile", "mainframe"), ("no profile 'mainframe'", "ling-1t")),
        (("--draft", "fast"), ("no draft worker 'fast'", "ngram")),
        (("--prompts", "none.jsonl"), ("cannot read the prompts in none.jsonl",)),
        (("--scene", "x"), ("no scene 'x'", "greedy")),
        (("--suite", "paper", "--policy", "plain"), ("a scene says itself",)),
        (("--time-scale", "0.5"), ("--time-scale 0.5", "--profile")),
        (("--policy", "sequential:4:0.5", "--concurrency", "2"), ("one prompt at a time",)),
        (("--set", "verifier.nmax=4"), ("unknown key verifier.nmax", "did you mean")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_one_line(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Before anything is started."""
    ended = draftwire(*arguments)
    assert ended.returncode == 78
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    for part in parts:
        assert part in ended.stderr


def test_scenes_are_listed() -> None:
    """--list names each scene, and starts nothing."""
    ended = draftwire("--list")
    assert ended.returncode == 0
    for scene in SUITES["paper"]:
        assert f"\n{scene.name} " in ended.stdout
