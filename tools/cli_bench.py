"""`draftwire bench`: the commands that measure. As in `tools/cli.py`, they import what they need when they run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import SettingsError
from tools.cli_options import CONTEXT, ConfigOption, SetOption, settings_of

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)


@bench_app.callback()
def bench() -> None:
    """Measure an engine, or the pipeline.

    \b
    Examples:
      draftwire bench engine embedded:target
      draftwire bench loopback
      draftwire bench acceptance --prompts 20
      draftwire bench speculation --profile ling-1t
    """


@bench_app.command("loopback")
def bench_loopback_command(
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Generations, one after the other.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="Tokens of each generation.")] = 400,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy, the cheapest.")] = 0.0,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure one speculative round outside the engines: all hops, messages and scheduling, hop by hop.

    Starts a fleet of its own with engines that take no time.

    \b
    Examples:
      draftwire bench loopback
      draftwire bench loopback --temperature 0.8
      draftwire bench loopback --tokens 2000 --set verifier.n_max=8
    """
    from rich.console import Console

    from tools.bench_loopback import bench_loopback, print_loopback

    print_loopback(
        bench_loopback(
            prompts=prompts, tokens=tokens, temperature=temperature, config=config, overrides=overrides or ()
        ),
        Console(markup=False),
    )


@bench_app.command("acceptance")
def bench_acceptance_command(
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="How many of the bundled prompts.")] = 200,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of each completion.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="Of the sampled modes.")] = 0.8,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Acceptance by depth for greedy, coupled and rejection sampling, and how often the text differs from plain.

    Starts a fleet of its own and completes the bundled prompts, plainly and with the draft.

    \b
    Examples:
      draftwire bench acceptance
      draftwire bench acceptance --prompts 20 --set verifier.engine.engine=numpy
    """
    from rich.console import Console

    from tools.bench_acceptance import bench_acceptance, print_acceptance

    console = Console(markup=False)
    print_acceptance(
        bench_acceptance(
            console,
            n_prompts=prompts,
            n_tokens=tokens,
            temperature=temperature,
            config=config,
            overrides=overrides or (),
        ),
        console,
    )


@bench_app.command("engine")
def bench_engine_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, embedded:target or embedded:draft.")],
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="auto|ik|numpy|cuda|emulated", help="Instead of verifier.engine.engine."),
    ] = None,
    context: Annotated[
        str,
        typer.Option("--context", metavar="LIST", help="Tokens in the cache before each pass; 0: an empty one."),
    ] = "256",
    prefill: Annotated[str, typer.Option("--prefill", metavar="LIST", help="Lengths of the prompt.")] = "512",
    decode: Annotated[int, typer.Option("--decode", min=1, help="Tokens decoded one at a time.")] = 32,
    rows: Annotated[
        str, typer.Option("--rows", metavar="LIST", help="Rows of a pass; one row is always measured.")
    ] = "1-16",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measurements of everything.")] = 7,
    random_tokens: Annotated[
        bool, typer.Option("--random-tokens", help="Passes of rows take random tokens, for models with random weights.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures to FILE as well.")
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure an engine alone: prefill, decode, and what n rows cost.

    A LIST is numbers and ranges: 0,4096 or 1-8,16. Every other engine setting (threads, cache types, ...) is taken
    from the table verifier.engine.

    \b
    Examples:
      draftwire bench engine embedded:target
      draftwire bench engine model.gguf --engine numpy --rows 1-8 --repeats 3
      draftwire bench engine model.gguf --context 0,4096 --prefill 512,2048 --set verifier.engine.n_ctx=8192
      draftwire bench engine model.gguf --rows 1,2,4,8,16,32 --json figures.json
      draftwire bench engine embedded:target --engine emulated --set verifier.engine.profile=ling-1t
    """
    import structlog

    from tools.bench_engine import bench_engine, parse_sizes, print_engine_bench, write_json

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for the table
    settings = replace(settings_of(config, overrides, None).verifier.engine, model=model)
    if engine is not None:
        settings = replace(settings, engine=engine)
    contexts = parse_sizes("--context", context, least=0)
    prefills, row_counts = parse_sizes("--prefill", prefill), parse_sizes("--rows", rows)
    if json_file is not None:
        write_json(json_file, None)  # what cannot be written is better known before than after the measurement
    bench = bench_engine(
        settings,
        contexts=contexts,
        prefills=prefills,
        decode_tokens=decode,
        rows=row_counts,
        repeats=repeats,
        random_tokens=random_tokens,
    )
    print_engine_bench(bench)
    if json_file is not None:
        write_json(json_file, bench)


@bench_app.command("agreement")
def bench_agreement_command(
    temperature: Annotated[str, typer.Option("--temperature", "-t", metavar="LIST", help="Separated by commas.")] = (
        "0.7,1.0"
    ),
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 0.95,
    prompts: Annotated[int, typer.Option("--prompts", min=1, max=10_000, help="Of the bundled ones.")] = 40,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Of each text.")] = 100,
    draft: Annotated[
        str, typer.Option("--draft", metavar="NAME", help="Whose model drafts; by default the first.")
    ] = "",
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure how often a draft's token is the target's, and how often it could be at best.

    Token by token along texts that the target samples, without the pipeline: by coupled sampling, by greedy drafts as
    servers draft today, and the most that any rule can reach (1 - TV of the two distributions).

    \b
    Examples:
      draftwire bench agreement
      draftwire bench agreement --temperature 0.4,0.8,1.2 --prompts 100
      draftwire bench agreement --set verifier.engine.model=big.gguf --set draft.model.engine.model=small.gguf
    """
    from rich.console import Console

    from tools.bench_agreement import bench_agreement, print_agreement
    from tools.bench_speculation_scenes import drafting_model

    try:
        temperatures = [float(part) for part in temperature.split(",")]
    except ValueError:
        raise SettingsError(f"--temperature {temperature}", "numbers, separated by commas") from None
    settings = settings_of(config, overrides, None)
    worker = drafting_model(settings, draft or "auto")
    console = Console(markup=False, highlight=False)
    results = bench_agreement(
        settings.verifier.engine,
        worker.engine,
        temperatures=temperatures,
        top_p=top_p,
        n_prompts=prompts,
        n_tokens=tokens,
        console=console,
    )
    print_agreement(results, console)


@bench_app.command("routing")
def bench_routing_command() -> None:
    """Play the router's choices of draft workers against an oracle, in simulated time.

    Scenes of workers with true speeds that the router does not know, and has to learn: near and slow beside far and
    fast, eight mixed, one that gets slow, one that comes and goes. Printed is what it reaches of the tokens/s of an
    oracle that knows them; beside it the nearest worker, a random one, and each in turn. Takes about a minute.

    \b
    Examples:
      draftwire bench routing
    """
    from rich.console import Console

    from tools.routing_simulation import bench_routing, routing_table

    Console(markup=False, highlight=False).print(routing_table(bench_routing()))


@bench_app.command("speculation")
def bench_speculation_command(
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", metavar="N|FILE", help='How many bundled ones; or a text file, or .jsonl with {"prompt": ...}.'
        ),
    ] = "8",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Most tokens of each completion.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of every prompt, each with another seed.")] = 1,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", metavar="POLICY", help="See above; may be given again.  [adaptive]"),
    ] = None,
    draft: Annotated[
        str, typer.Option("--draft", metavar="LIST", help="Workers side by side: model, ngram, garbage, or names.")
    ] = "",
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="Of target and draft models: auto, ik, numpy, cuda, ...")
    ] = "",
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME", help="Emulate a machine: ling-1t, qwen3-coder-480b.")
    ] = "",
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first completion.")] = 0,
    rtt_ms: Annotated[
        float, typer.Option("--rtt-ms", min=0.0, metavar="MS", help="From router to draft workers and back.")
    ] = 0.0,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=256, help="Completions at a time.")] = 1,
    time_scale: Annotated[
        float, typer.Option("--time-scale", min=0.01, max=100.0, help="Multiplies all paces and round trips.")
    ] = 1.0,
    suite: Annotated[str, typer.Option("--suite", metavar="NAME", help="Measure its scenes: paper.")] = "",
    scene: Annotated[
        list[str] | None, typer.Option("--scene", metavar="NAME", help="One scene of a suite; may be given again.")
    ] = None,
    list_scenes: Annotated[bool, typer.Option("--list", help="Show the scenes and end.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Write results.json, completions.csv and scatter.svg there."),
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure policies of speculation against plain decoding, in one run.

    Starts a fleet of its own for each policy, lets them complete the prompts in turn, and prints speed, acceptance,
    wasted rows, bytes on the wire and the time of each stage. Plain decoding is always measured too. Ctrl-C prints
    what there is.

    \b
    Policies, each with @WORKER to say who drafts; the pipeline's with +rejection for that acceptance rule:
      plain             no speculation
      adaptive[:N]      the pipeline chooses how many proposals a step verifies, up to N
      fixed:N           it verifies all that are there, up to N
      sequential:N:P    as in llama-server: draft up to N, stop before the first whose probability is under P,
                        verify, in turn, in one process; +greedy: the most probable tokens also where the target
                        samples, as it drafts

    With --profile the machine is emulated, on two cores: see docs/measuring.md. A suite is a set of scenes that say
    all of this themselves; sizes, seed, scale and settings are still the options'.

    \b
    Examples:
      draftwire bench speculation --profile ling-1t
      draftwire bench speculation --profile ling-1t -p adaptive -p fixed:4 -p sequential:16:0.75 --time-scale 0.5
      draftwire bench speculation --profile ling-1t --rtt-ms 20 -t 0.7 --prompts mine.jsonl --out results
      draftwire bench speculation --draft model,ngram -p adaptive -p adaptive@ngram --prompts long.txt
      draftwire bench speculation --list
      draftwire bench speculation --suite paper --prompts 20 --out results
      draftwire bench speculation --scene greedy --scene copies
    """
    import logging

    import structlog
    from rich.console import Console

    from tools.bench_speculation import BenchOptions, SceneResult, run_scenes
    from tools.bench_speculation_report import prepare_output, print_scene, print_scenes, save
    from tools.bench_speculation_scenes import Scene, drafting_model, find_scenes, read_prompts

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))  # engines in this process
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    if list_scenes:
        print_scenes(find_scenes(suite or "paper", scene or ()), console)
        return
    if suite or scene:
        scenes = find_scenes(suite or "paper", scene or ())
        if policy or draft or engine or profile or temperature or top_p != 0.95 or rtt_ms or concurrency != 1:
            raise SettingsError("a scene says itself what is measured", "leave --suite and --scene away, or the others")
    else:
        drafts = tuple(name.strip() for name in draft.split(",")) if draft else ()
        scenes = (
            Scene(
                "custom",
                "",
                tuple(policy or ("adaptive",)),
                engine=engine,
                profile=profile,
                drafts=drafts,
                temperature=temperature,
                top_p=top_p,
                rtt_ms=rtt_ms,
                concurrency=concurrency,
            ),
        )
    whole_suite = bool(suite and not scene)
    if whole_suite:
        settings = settings_of(config, overrides, None)
        models = settings.verifier.engine, drafting_model(settings).engine
    if out is not None:
        prepare_output(out)  # what cannot be written is better known before than after the measurement
    options = BenchOptions(
        read_prompts(prompts), tokens, repeats, seed, time_scale, config=config, overrides=tuple(overrides or ())
    )
    results: list[SceneResult] = []
    for result in run_scenes(scenes, options, console):
        results.append(result)
        print_scene(result, console)
        if out is not None:
            save(results, out)
    if results[-1].interrupted:
        raise typer.Exit(130)
    if whole_suite:
        from tools.bench_agreement import bench_agreement, print_agreement
        from tools.routing_simulation import bench_routing, routing_table

        console.print("\nagreement - one by one, without the pipeline (`draftwire bench agreement`)\n")
        agreed = bench_agreement(
            *models, temperatures=(0.7, 1.0), top_p=0.95, n_prompts=40, n_tokens=100, console=console
        )
        print_agreement(agreed, console)
        console.print("\nrouting - the choice of draft workers, in simulated time (`draftwire bench routing`)\n")
        console.print(routing_table(bench_routing()))
