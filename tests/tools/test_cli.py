"""The `draftwire` command as a person meets it: real processes, exit statuses, what stands on stderr."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shared.service import EXIT_CONFIG
from tools.supervisor import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
COMMANDS = (
    "up",
    "service",
    "generate",
    "status",
    "top",
    "workers",
    "workers drain",
    "workers ban",
    "workers pin",
    "workers allow",
    "explain",
    "trace",
    "demo",
    "doctor",
    "perplexity",
    "estimate",
    "bench",
    "bench engine",
    "bench speculation",
    "bench agreement",
    "bench routing",
    "api-keys",
    "api-keys add",
    "api-keys list",
    "api-keys limits",
    "api-keys revoke",
    "units",
    "units render",
    "units install",
    "units uninstall",
    "journal",
    "journal report",
    "journal plot",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    def assert_one_line(self, status: int, *parts: str) -> None:
        """One line on stderr that holds all parts, nothing on stdout, no traceback."""
        assert self.status == status, self
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("draftwire: error: ")
        for part in parts:
            assert part in self.err


def draftwire(*arguments: str, stdin: str = "", environment: dict[str, str] | None = None) -> Ended:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTWIRE_")}
    ended = subprocess.run(
        [sys.executable, "-m", "tools.cli", *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONWARNINGS": "error", **(environment or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    """Every command's help has examples that begin with the command itself."""
    ended = draftwire(*command.split(), "--help")
    assert ended.status == 0
    examples = ended.out.partition("Examples:\n")[2].partition("Options:")[0]
    assert f"  draftwire {command}" in examples, ended.out


def test_help_lists_every_command() -> None:
    """`draftwire --help` names the commands, each with a whole sentence."""
    out = draftwire("--help").out
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert listed == [
        "up",
        "service",
        "generate",
        "status",
        "top",
        "explain",
        "trace",
        "demo",
        "doctor",
        "perplexity",
        "estimate",
        "bench",
        "config",
        "keys",
        "api-keys",
        "units",
        "journal",
        "workers",
    ]
    assert all(line.endswith(".") and not line.endswith("...") for line in out.partition("Commands:\n")[2].splitlines())


def test_version() -> None:
    """--version prints the name and a version."""
    ended = draftwire("--version")
    assert ended.status == 0
    assert ended.out.startswith("draftwire ")


def test_wrong_usage_is_explained() -> None:
    """An unknown option is a usage error with status 2, without a traceback."""
    ended = draftwire("up", "--nonsense")
    assert ended.status == 2
    assert "No such option" in ended.err
    assert "Traceback" not in ended.err


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        *(("up",), ("service", "router"), ("generate", "x"), ("demo",), ("perplexity", "embedded:draft")),
        ("bench", "engine", "embedded:draft"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_unknown_setting_is_one_line(arguments: tuple[str, ...]) -> None:
    """A misspelt key ends every command with EX_CONFIG and the key that was meant."""
    ended = draftwire(*arguments, "--set", "gateway.prot=1")
    ended.assert_one_line(EXIT_CONFIG, "unknown key gateway.prot", "did you mean gateway.port?")


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    """The error says which file it stands in, however the file was named."""
    path = tmp_path / "draftwire.toml"
    path.write_text("[verifier]\nn_maximum = 4\n")
    draftwire("up", "--config", str(path)).assert_one_line(EXIT_CONFIG, str(path), "unknown key verifier.n_maximum")
    by_environment = draftwire("up", environment={"DRAFTWIRE_CONFIG": str(path)})
    by_environment.assert_one_line(EXIT_CONFIG, str(path), "unknown key verifier.n_maximum")


def test_missing_configuration_file(tmp_path: Path) -> None:
    """A configuration file that is not there is an error, not a fleet with defaults."""
    draftwire("up", "--config", str(tmp_path / "none.toml")).assert_one_line(EXIT_CONFIG, "no configuration file")


def test_markup_in_user_text_is_printed_as_it_is() -> None:
    """Square brackets in what the user typed are not eaten."""
    draftwire("service", "[red]x[/red]").assert_one_line(EXIT_CONFIG, "'[red]x[/red]'", "one of gateway, tokenizer")


def test_bench_engine_writes_json(tmp_path: Path) -> None:
    """Lists of sizes are taken, a table goes to stdout and all figures to the file."""
    path = tmp_path / "figures.json"
    sizes = ("--context", "0,8", "--prefill", "8,16", "--decode", "2", "--rows", "1-2,4", "--repeats", "1")
    ended = draftwire("bench", "engine", "null", "--engine", "null", *sizes, "--json", str(path))
    assert (ended.status, ended.err) == (0, "")
    assert "after 0 tokens of context" in ended.out
    written = json.loads(path.read_text())
    assert [cost["context"] for cost in written["contexts"]] == [0, 8]
    assert [row["rows"] for row in written["contexts"][0]["rows"]] == [1, 2, 4]


def test_bench_engine_with_wrong_sizes(tmp_path: Path) -> None:
    """What is no list, and a file that cannot be written, are one line each, before the model is looked for."""
    draftwire("bench", "engine", "none", "--rows", "x").assert_one_line(EXIT_CONFIG, "--rows is 'x'", "such as 1,2,4")
    ended = draftwire("bench", "engine", "none", "--json", str(tmp_path / "none/x"))
    ended.assert_one_line(EXIT_CONFIG, "cannot write", "another file")


# --- up and service ---------------------------------------------------------------------------------------------------


def test_unwritable_run_directory(tmp_path: Path) -> None:
    """A run directory that cannot be made is one line, before anything is started."""
    (tmp_path / "file").write_text("")
    ended = draftwire("up", "--run-dir", str(tmp_path / "file" / "run"))
    ended.assert_one_line(EXIT_CONFIG, "cannot use the run directory", "--run-dir")


def test_run_directory_in_use(tmp_path: Path) -> None:
    """A second fleet in a run directory is refused, and the first one's lock is left alone."""
    first = RunDirectory(tmp_path / "run")
    ended = draftwire("up", "--run-dir", str(tmp_path / "run"))
    ended.assert_one_line(EXIT_CONFIG, "another fleet", str(os.getpid()), "--run-dir")
    assert (tmp_path / "run/lock").read_text() == f"{os.getpid()}\n"
    first.close()


def test_run_directory_whose_sockets_would_be_too_long(tmp_path: Path) -> None:
    """A path too long for sockets is one line from `up` itself, not one from each child."""
    draftwire("up", "--run-dir", str(tmp_path / ("x" * 100))).assert_one_line(EXIT_CONFIG, "shorter run_dir")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--instance", "other"), "there is no draft worker 'other'"),
        (("--set", "draft.a.drafter=ngram", "--set", "draft.b.drafter=ngram"), "which draft worker?"),
        (("--set", "draft={}"), "configured: none"),
    ],
    ids=["unknown", "ambiguous", "none"],
)
def test_draft_worker_that_is_not_configured(arguments: tuple[str, ...], expected: str) -> None:
    """A draft worker is one of the settings' tables; which ones there are is said."""
    draftwire("service", "draft", *arguments).assert_one_line(EXIT_CONFIG, expected, "configured: ")


def test_service_outlives_no_supervisor(tmp_path: Path) -> None:
    """A supervised service whose supervisor has gone before it could start ends at once."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ended = draftwire("service", "router", "--run-dir", str(tmp_path / "run"), "--supervisor", str(gone.pid))
    assert ended.status == 1
    assert not (tmp_path / "run").exists()


# --- generate, against a gateway of the test's own --------------------------------------------------------------------

FINAL = {
    "content": "",
    "tokens": [],
    "stop": True,
    "seed": 7,
    "timings": {
        "predicted_n": 4,
        "predicted_ms": 8.0,
        "predicted_per_second": 500.0,
        "draft_n": 4,
        "draft_n_accepted": 2,
    },
    "draftwire": {"rounds": 2, "acceptance_rate": 0.5, "mean_acceptance_length": 2.0, "worker": "model"},
}
CHUNKS = [
    {"content": " ab", "tokens": [1, 2], "pieces": [" a", "b"], "n_accepted": 1, "stop": False},
    {"content": "cé", "tokens": [3, 4], "pieces": ["c", "é"], "n_accepted": 1, "stop": False},
]


@dataclass
class FakeGateway:
    """Answers every POST with `status` and `body`, and remembers what was asked."""

    body: bytes
    status: int = 200
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    url: str = ""


@contextmanager
def gateway(body: bytes, status: int = 200) -> Iterator[FakeGateway]:
    fake = FakeGateway(body, status)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.asked.append((self.path, asked))
            self.send_response(fake.status)
            self.end_headers()
            self.wfile.write(fake.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


def events(*values: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


def test_generate_streams_text_and_figures() -> None:
    """Text alone on stdout, one line of figures on stderr; parameters that were not given are left to the gateway."""
    with gateway(events(*CHUNKS, FINAL)) as fake:
        ended = draftwire("generate", "def", "--url", fake.url, "--temperature", "0.5", "--seed", "7", "-n", "4")
    assert ended.status == 0
    assert ended.out == " abcé\n"
    assert ended.err == (
        "draftwire: 4 tokens in 0.01 s, 500.0 tokens/s, seed 7; 2 rounds, 2 of 4 proposals accepted (50 %), "
        "2.00 tokens a round; draft worker model\n"
    )
    [(path, asked)] = fake.asked
    assert path == "/completion"
    assert asked == {
        "prompt": "def",
        "n_predict": 4,
        "stream": True,
        "temperature": 0.5,
        "seed": 7,
        "draft": "auto",
        "acceptance": "coupled",
        "return_tokens": True,
    }


def test_generate_marks_accepted_tokens() -> None:
    """--marks puts accepted tokens in ‹ › where there is no colour."""
    with gateway(events(*CHUNKS, FINAL)) as fake:
        assert draftwire("generate", "def", "--url", fake.url, "--marks").out == "‹ a›b‹c›é\n"


def test_generate_reads_the_prompt_from_stdin() -> None:
    """ "-" takes the prompt from stdin as it is."""
    with gateway(events(FINAL)) as fake:
        assert draftwire("generate", "-", "--url", fake.url, stdin="a\n b\n").status == 0
    assert fake.asked[0][1]["prompt"] == "a\n b\n"


def test_generate_prints_json() -> None:
    """--json asks for the whole answer and prints it as it came."""
    with gateway(json.dumps({**FINAL, "content": "abc"}).encode()) as fake:
        ended = draftwire(
            "generate", "def", "--url", fake.url, "--json", "--draft", "none", "--acceptance", "rejection"
        )
    assert json.loads(ended.out) == {**FINAL, "content": "abc"}
    asked = fake.asked[0][1]
    assert (asked["stream"], asked["draft"], asked["acceptance"]) == (False, "none", "rejection")


def test_generate_finds_the_gateway_of_the_run_directory(tmp_path: Path) -> None:
    """Without --url it is the gateway that has left its address in the run directory."""
    with gateway(events(FINAL)) as fake:
        port = int(fake.url.rpartition(":")[2])
        (tmp_path / "gateway.json").write_text(json.dumps({"host": "127.0.0.1", "port": port}))
        assert draftwire("generate", "def", "--run-dir", str(tmp_path)).status == 0
    assert len(fake.asked) == 1


def test_generate_without_a_fleet(tmp_path: Path) -> None:
    """No fleet: what to start; a stale address is no better than none."""
    ended = draftwire("generate", "x", "--run-dir", str(tmp_path))
    ended.assert_one_line(1, f"no gateway at {tmp_path}", "`draftwire up`")
    with gateway(b"") as fake:
        pass
    ended = draftwire("generate", "x", "--url", fake.url)
    ended.assert_one_line(1, f"no gateway at {fake.url}", "Connection refused", "`draftwire up`")


def test_generate_with_an_url_that_is_none() -> None:
    """What is no URL is said so."""
    draftwire("generate", "x", "--url", "box:8080").assert_one_line(EXIT_CONFIG, "'box:8080' is no URL")


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (json.dumps({"error": {"message": "the prompt is empty", "code": "empty_prompt"}}).encode(), 400, "is empty"),
        (b"<html>", 502, "HTTP status 502"),
        (b'{"error": "old"}', 404, "HTTP status 404"),
        (b"data: <html>\n\n", 200, "no Draftwire gateway"),
        (b"", 200, "ended the stream in the middle"),
    ],
    ids=["refused", "no json", "another shape", "no events", "cut"],
)
def test_generate_explains_a_bad_answer(body: bytes, status: int, expected: str) -> None:
    """A refusal is the gateway's own message; anything else is explained; always one line and status 1."""
    with gateway(body, status) as fake:
        ended = draftwire("generate", "x", "--url", fake.url)
    assert ended.status == 1
    assert expected in ended.err
    assert ended.err.startswith("draftwire: error: ")
    assert ended.err.count("\n") == 1


def test_generate_keeps_the_text_before_an_error() -> None:
    """An error in the middle of a stream leaves what has come on stdout and says what happened."""
    with gateway(events(CHUNKS[0], {"error": {"message": "the verifier is gone", "code": "verifier_lost"}})) as fake:
        ended = draftwire("generate", "x", "--url", fake.url)
    assert (ended.status, ended.out, ended.err) == (1, " ab\n", "draftwire: error: the verifier is gone\n")
