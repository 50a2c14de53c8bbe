"""The `draftwire` command: what a person types, and what systemd runs.

Commands import what they need when they run, so that `--help` answers at once. Invariant: an expected error is one
line on stderr and an exit status, never a traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from shared.errors import DraftwireError, ModelError, SettingsError
from tools.cli_api_keys import api_keys_app
from tools.cli_bench import bench_app
from tools.cli_config import config_app
from tools.cli_journal import journal_app
from tools.cli_keys import keys_app
from tools.cli_options import (
    CONTEXT,
    ApiKeyFileOption,
    ApiKeyOption,
    CacertOption,
    ConfigOption,
    RunDirOption,
    SetOption,
    all_overrides,
    config_path,
    credentials_of,
    settings_of,
)
from tools.cli_trace import trace_command
from tools.cli_units import units_app
from tools.cli_watch import status_command, top_command, workers_app

if TYPE_CHECKING:
    from shared.settings import Settings

SERVICES = ("gateway", "tokenizer", "router", "draft", "verifier", "sampler")

app = typer.Typer(
    name="draftwire",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(api_keys_app, name="api-keys")
app.add_typer(units_app, name="units")
app.add_typer(journal_app, name="journal")


def _print_version(wanted: bool) -> None:
    if wanted:
        from shared.service import version

        typer.echo(f"draftwire {version()}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve large quantized MoE language models faster: speculative decoding over the network.

    Draft workers propose tokens, one target verifier checks whole runs of them in a single forward pass. What comes
    out depends on the target and the seed alone.

    \b
    Examples:
      draftwire demo                               see it work, in a minute
      draftwire up                                 run the whole fleet here, until Ctrl-C
      draftwire generate "def fibonacci(n):"       ask the running fleet (in another terminal)
      draftwire status                             is it well?
      draftwire doctor                             what is missing on this machine?
    """


@app.command()
def up(config: ConfigOption = None, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    """Run the whole fleet here until Ctrl-C.

    Starts sampler, tokenizer, router, verifier, one process for each draft worker, and the gateway; restarts what
    dies; on Ctrl-C lets running generations end, then stops everything. Log lines (JSON) go to stdout, what the
    supervisor has to say to stderr.

    \b
    Examples:
      draftwire up                                              the embedded pair, port 8080
      draftwire up --set gateway.port=0 --run-dir /tmp/second   a second fleet beside it
      draftwire up --set verifier.engine.model=big.gguf --set draft.small.engine.model=small.gguf
      draftwire up --set draft.lookup.drafter=ngram             draft by prompt lookup
      draftwire up --config draftwire.toml >> draftwire.log
    """
    import asyncio

    from shared.curve import check_endpoints
    from tools.fleet import is_serving
    from tools.supervisor import Supervisor

    config = config_path(config)
    settings = settings_of(config, overrides, run_dir)
    check_endpoints(settings)  # an endpoint that cannot be is one line now instead of one from each child
    changes = all_overrides(overrides, run_dir)
    supervisor = Supervisor(settings, config, changes, serving=lambda: is_serving(settings))
    status = asyncio.run(supervisor.run())
    raise typer.Exit(status)


@app.command()
def service(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(SERVICES)}.")],
    instance: Annotated[
        str, typer.Option("--instance", "-i", metavar="X", help="Its own name; of a draft worker, its [draft.X] table.")
    ] = "",
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    supervisor: Annotated[int | None, typer.Option("--supervisor", hidden=True)] = None,
) -> None:
    """Run one service in the foreground.

    For systemd, for several hosts, and for looking at one process. Ends on SIGTERM after a drain. Exit status 78
    means that starting again cannot help (settings, model file).

    \b
    Examples:
      draftwire service router
      draftwire service verifier --config /etc/draftwire/draftwire.toml
      draftwire service draft --instance model
    """
    if supervisor is not None:
        from tools.supervisor import end_with_supervisor

        end_with_supervisor(supervisor)
    if name not in SERVICES:
        raise SettingsError(f"there is no service {name!r}", f"one of {', '.join(SERVICES)}")
    settings = settings_of(config, overrides, run_dir)
    if name == "draft":
        instance = _draft_instance(settings, instance)
    from shared.service import run_service

    module = importlib.import_module(f"services.{name}.service")
    status = run_service(module.SERVICE, settings, instance, lambda: settings_of(config, overrides, run_dir))
    raise typer.Exit(status)


def _draft_instance(settings: Settings, instance: str) -> str:
    known = ", ".join(settings.draft) or "none"
    if not instance and len(settings.draft) == 1:
        return next(iter(settings.draft))
    if not instance:
        raise SettingsError("which draft worker?", f"give --instance; configured: {known}")
    if instance not in settings.draft:
        raise SettingsError(
            f"there is no draft worker {instance!r} in the settings",
            f"configured: {known}; add a [draft.{instance}] table",
        )
    return instance


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='The text to continue; "-" reads it from stdin.')],
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy; default 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Keep the K likeliest tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", min=0.0, max=1.0, help="Keep the likeliest tokens up to this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p", min=0.0, max=1.0, help="Drop tokens below this share of the likeliest one's probability."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="With the target, all that the text depends on.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")] = 128,
    draft: Annotated[
        str,
        typer.Option("--draft", metavar="auto|none|NAME", help="Who drafts: the router's choice, nobody, a worker."),
    ] = "auto",
    acceptance: Annotated[
        str, typer.Option("--acceptance", metavar="coupled|rejection", help="The acceptance rule.")
    ] = "coupled",
    marks: Annotated[bool, typer.Option("--marks", help="Mark the tokens that the draft proposed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the gateway's answer as JSON, when it is whole.")
    ] = False,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="A gateway elsewhere, e.g. http://box:8080.")] = "",
    api_key: ApiKeyOption = "",
    api_key_file: ApiKeyFileOption = None,
    cacert: CacertOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Continue a prompt with the running fleet.

    Text goes to stdout as it comes, one line of figures to stderr.

    \b
    Examples:
      draftwire generate "def fibonacci(n):" --temperature 0
      draftwire generate "def fibonacci(n):" --seed 7 --marks
      draftwire generate - --draft none --json < prompt.txt
      draftwire generate "def f(" --url https://box:8080 --cacert box.pem --api-key-file ~/.config/draftwire-key
    """
    from tools.generate import GenerateOptions, run_generate

    if acceptance not in ("coupled", "rejection"):
        raise SettingsError(f"--acceptance is {acceptance!r}", "coupled or rejection")
    text = sys.stdin.read() if prompt == "-" else prompt
    options = GenerateOptions(
        prompt=text,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        draft=draft,
        acceptance=acceptance,
    )
    run_generate(
        settings_of(config, overrides, run_dir),
        options,
        url=url,
        marks=marks,
        as_json=as_json,
        credentials=credentials_of(api_key, api_key_file, cacert),
    )


app.command("status")(status_command)
app.command("top")(top_command)
app.add_typer(workers_app, name="workers")


@app.command()
def explain(
    session: Annotated[
        str, typer.Argument(metavar="[SESSION]", help="Its 16 digits, as in request_done and `draftwire workers`.")
    ] = "",
    last: Annotated[bool, typer.Option("--last", help="The session opened last (the default).")] = False,
    steps: Annotated[int, typer.Option("--steps", "-n", min=1, metavar="N", help="Show the last N steps.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known as JSON, one object.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Say why steps verified so many proposals.

    For the last 512 steps of one of the last sessions (16, or two for each slot of the verifier), also while it runs.

    \b
    there      proposals that had arrived and might be verified
    expected   accepted ones, by what proposals of such confidence were worth so far
    ms         what a step of so many rows, of all sessions together, was expected to take

    \b
    Examples:
      draftwire explain
      draftwire explain 1f3a5c7e9b2d4f60 --steps 100
      draftwire explain --json | jq '.decisions[] | {position, length, reason}'
    """
    from rich.console import Console

    from tools.explain import explanation_json, fetch, parse_session, print_explanation

    if session and last:
        raise SettingsError("a session and --last exclude each other", "give one of them")
    explanation = fetch(settings_of(config, overrides, run_dir), parse_session(session) if session else 0)
    if as_json:
        print(json.dumps(explanation_json(explanation), indent=2))
    else:
        print_explanation(explanation, steps, Console(markup=False, highlight=False))


app.command("trace")(trace_command)


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Instead of the bundled code.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")] = 1,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.")] = 96,
    draft: Annotated[str, typer.Option("--draft", metavar="none|model|ngram", help="Who drafts.")] = "model",
    engine: Annotated[
        str,
        typer.Option(
            "--engine", metavar="auto|ik|numpy|cuda|emulated", help="Engine of the target and of the draft model."
        ),
    ] = "auto",
    no_scene: Annotated[bool, typer.Option("--no-scene", help="Leave the emulated machine at the end away.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """See it work, in a minute.

    Starts a fleet of its own, continues one prompt plainly and speculatively, shows both and what they cost, and
    ends everything it started. Needs no GPU, no download and no running fleet. With default engines, whose small pair
    gains nothing on two cores, it ends with the same at the pace of a 1T model in RAM, emulated.

    \b
    Examples:
      draftwire demo
      draftwire demo --temperature 0.8 --seed 7
      draftwire demo --draft ngram --prompt "x = [1, 2, 3]"
      draftwire demo --engine numpy --max-tokens 32        slower, and exact to the bit
    """
    from tools.demo import DemoOptions, run_demo

    if draft not in ("none", "model", "ngram"):
        raise SettingsError(f"--draft is {draft!r}", "none, model or ngram")
    options = DemoOptions(prompt, temperature, seed, max_tokens, draft, engine, not no_scene)
    raise typer.Exit(run_demo(options, config, list(overrides or ())))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
) -> None:
    """Check this machine and configuration.

    Prints OK, INFO, WARN or FAIL for each thing, with a remedy. Exit status 1 if anything is FAIL.

    \b
    Examples:
      draftwire doctor
      draftwire doctor --config /etc/draftwire/draftwire.toml
      draftwire doctor --json | jq '.checks[] | select(.level != "OK")'
    """
    from tools.doctor import run_doctor

    raise typer.Exit(run_doctor(config, all_overrides(overrides, run_dir), as_json))


@app.command("perplexity")
def perplexity_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, embedded:target or embedded:draft.")],
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="auto|ik|numpy|cuda", help="Instead of verifier.engine.engine.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="TEXT|JSONL", help='UTF-8 text; in a .jsonl, {"text": ...} on each line.'),
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", min=2, help="Most tokens computed from an empty context.")] = 1024,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Score only the first N tokens; 0: all.")] = 0,
    against: Annotated[
        str, typer.Option("--against", metavar="ENGINE", help="Compare with this engine on the same tokens.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure how well a model predicts a text, and compare engines.

    Without --file it is the 200 embedded prompts, which no training document contains. A chunk is the model's
    document-start (BOS) token and up to N-1 tokens of one text, computed from an empty context. Every token of text
    is scored, as in the model card; llama.cpp scores only the second half of each window, so its figures are lower.
    Longer chunks mean more context and a lower perplexity: compare only figures of the same text and --chunk.

    --against prints, as llama.cpp's --kl-divergence does, the mean KL divergence from the other engine, how often
    both have the same best token, and the ratio of the perplexities. Errors behind +/- are standard errors, which
    take the tokens as independent. Every other engine setting is taken from the table verifier.engine.

    \b
    Examples:
      draftwire perplexity embedded:target
      draftwire perplexity model.gguf --file wiki.test.raw --chunk 2048 --limit 100000
      draftwire perplexity embedded:draft --engine ik --against numpy --limit 2000
      draftwire perplexity model.gguf --set verifier.engine.cache_type_k=q8_0 --json | jq .perplexity
    """
    import structlog
    from rich.console import Console

    from tools.perplexity import measure_perplexity, perplexity_json, perplexity_lines

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for the result
    settings = replace(settings_of(config, overrides, None).verifier.engine, model=model)
    if engine is not None:
        settings = replace(settings, engine=engine)
    result = measure_perplexity(
        settings, path=file, chunk=chunk, limit=limit, against=against, console=Console(stderr=True, markup=False)
    )
    if as_json:
        print(json.dumps(perplexity_json(result), indent=2))
    else:
        print("\n".join(perplexity_lines(result)))


@app.command("estimate")
def estimate_command(
    target_tps: Annotated[
        float, typer.Option("--target-tps", metavar="T/S", help="Tokens/s of the target, decoding plainly.")
    ],
    draft_tps: Annotated[float, typer.Option("--draft-tps", metavar="T/S", help="Tokens/s of the draft by itself.")],
    acceptance: Annotated[
        str,
        typer.Option(
            "--acceptance",
            metavar="P|LIST",
            help="Probability that a proposal is accepted, 0 to 1; or, for depth 1, 2, ..., accepted / verified.",
        ),
    ],
    rtt: Annotated[
        float, typer.Option("--rtt", metavar="MS", help="Milliseconds from verifier to draft worker and back.")
    ] = 0.3,
    slope: Annotated[
        float, typer.Option("--slope", help="What each further row of a step costs, relative to the first.")
    ] = 0.39,
    n_max: Annotated[int, typer.Option("--n-max", help="Most proposals a step.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Predict what speculation brings, from two models' speeds.

    A step that verifies n proposals takes (1 + slope n) / target-tps seconds; of the slope, `draftwire bench engine`
    shows what it is, 0.39 having been measured with experts in RAM. One session, each model on a machine of its own.

    \b
    sequential  draft n tokens, send them, verify them, and so on in turn
    overlapped  the draft goes on while the target verifies, which decodes plainly until proposals are there;
                so does this server
    waiting     the same, but a step waits until it has n proposals
    ideal       overlapped, if a refused proposal cost the draft no time: the limit

    \b
    Examples:
      draftwire estimate --target-tps 6.25 --draft-tps 100 --acceptance 0.85
      draftwire estimate --target-tps 6.25 --draft-tps 100 --acceptance 0.86,0.75,0.69,0.60 --rtt 2
      draftwire estimate --target-tps 20 --draft-tps 60 --acceptance 0.7 --slope 0.2 --json | jq .best
    """
    from tools.estimate import estimate, estimate_json, parse_speculation, print_estimate

    result = estimate(parse_speculation(target_tps, draft_tps, acceptance, rtt, slope), n_max)
    if as_json:
        print(json.dumps(estimate_json(result), indent=2))
    else:
        print_estimate(result)


def fail(error: DraftwireError) -> NoReturn:
    """Print an error in one line and end with its status."""
    from shared.service import EXIT_CONFIG

    line = " ".join(str(error).split())
    print(f"draftwire: error: {line}", file=sys.stderr, flush=True)
    sys.exit(EXIT_CONFIG if isinstance(error, (SettingsError, ModelError)) else 1)


def main() -> None:
    """The console script."""
    try:
        app(prog_name="draftwire")
    except DraftwireError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        sys.exit(1)


if __name__ == "__main__":
    main()
