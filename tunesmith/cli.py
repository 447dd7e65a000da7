"""The command line: one function a command, no logic of its own. What a command needs is imported inside it.

Results go to standard output (with --json one JSON document and nothing else); progress and messages to standard error.
Exit codes: 0 done; 2 the input is at fault; 3 a gate or check said no; 1 our fault; 130 or 143 stopped by a signal.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from tunesmith.cli_data import data_app
from tunesmith.cli_options import Json, RecipeArgument, RunArgument, Set, WorkspaceOption, print_result, say, space_of
from tunesmith.errors import ElsewhereError, Interrupted, TunesmithError

app = typer.Typer(
    name="tunesmith",
    help="The fine-tuning service a team owns: choose a base, prepare the data, tune, prove it, ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")

SPIN_COUNT = "5000"  # OpenMP threads wait for one another this long before they give the core away (docs/log.md)
USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, or that of the copy of click inside newer typers


@app.command()
def quickstart(workspace: WorkspaceOption = None, as_json: Json = False) -> None:
    """The whole path on the starter model and the sample data, in under three minutes."""
    from tunesmith.quickstart import quickstart as run_quickstart
    from tunesmith.texts import evaluation_text
    from tunesmith.train.observers import terminal_progress

    document = run_quickstart(workspace=space_of(workspace), progress=terminal_progress, say=say)
    print_result(document, as_json=as_json, text=lambda: f"{evaluation_text(document)}\n\nreport: {document['report']}")


@app.command()
def init(
    source: Annotated[Path | None, typer.Option("--from", help="rows that the recipe should fit")] = None,
    out: Annotated[Path, typer.Option("--out", help="where to write the recipe")] = Path("recipe.yaml"),
    base: Annotated[str, typer.Option("--base", help="starter, a folder, or a hub name")] = "starter",
    as_json: Json = False,
) -> None:
    """Write a commented recipe that fits the data."""
    from tunesmith.init import write_recipe

    result = write_recipe(source, out=out, base=base)
    print_result(result, as_json=as_json, text=lambda: f"wrote {out}\n{result['why']}\nnext: tunesmith train {out}")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Set = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="run the steps with the largest packs, and correct it")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", min=0.0, help="of the machine; the recipe's by default")
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """What a run will need: memory by part, steps, tokens, time and cost. Nothing is trained."""
    from tunesmith.api import plan as run_plan

    found = run_plan(
        recipe,
        workspace=space_of(workspace),
        overrides=overrides,
        measure=measure,
        price_per_hour=price_per_hour,
        on_message=say,
    )
    print_result(found.as_dict(), as_json=as_json, text=found.as_text)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the recipe's unfinished run")] = False,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """Train a run."""
    from tunesmith.api import tune
    from tunesmith.texts import train_text
    from tunesmith.train.observers import terminal_progress

    with terminal_progress() as progress:  # shows nothing before it is told something, as only the first process is
        run = tune(recipe, workspace=space_of(workspace), overrides=overrides, resume=resume, observer=progress)
    if _process_number() == 0:
        print_result(run.summary, as_json=as_json, text=lambda: train_text(run.summary))


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option("--data", help="other held-out rows")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="base, few_shot, retrieval, tuned_retrieval, majority, mean, median (repeatable); the recipe's by default",
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", help="at most this many rows")] = None,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """Base and tuned on the same rows, with intervals and p-values; writes the report."""
    from tunesmith.api import evaluate as run_evaluate
    from tunesmith.api import evaluation_settings
    from tunesmith.runs import find_run
    from tunesmith.texts import evaluation_text

    space = space_of(workspace)
    found = find_run(run, workspace=space, finished=True)
    settings = evaluation_settings(found, against=against, rows=rows)
    evaluation = run_evaluate(found, data=data, settings=settings, workspace=space, on_progress=say)
    report = found.path / "report.html"
    print_result(
        evaluation.as_dict(),
        as_json=as_json,
        text=lambda: f"{evaluation_text(evaluation.document)}\n\nreport: {report}",
    )
    if not evaluation.document.get("gate", {}).get("passed", True):
        raise typer.Exit(3)


@app.command()
def curve(
    recipe: RecipeArgument,
    overrides: Set = None,
    parts: Annotated[
        int, typer.Option("--parts", min=3, max=8, help="shares: all of the rows, a half, a quarter, ...")
    ] = 4,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=20, help="runs of each share")] = 1,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """Would more rows help? Trains on shares of them, and says what twice as many would give."""
    from tunesmith.curve import learning_curve
    from tunesmith.recipe import load_recipe
    from tunesmith.texts import curve_text
    from tunesmith.train.observers import terminal_progress

    document = learning_curve(
        load_recipe(recipe, overrides=overrides),
        workspace=space_of(workspace),
        parts=parts,
        seeds=seeds,
        progress=terminal_progress,
        say=say,
    )
    print_result(document, as_json=as_json, text=lambda: curve_text(document))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="a run, or a base: starter, a folder, a hub name")],
    file: Annotated[
        list[Path] | None, typer.Option("--file", help="minimal pairs, last words or multiple choice; again for more")
    ] = None,
    harness: Annotated[
        str | None, typer.Option("--harness", help="tasks of lm-evaluation-harness, separated by commas")
    ] = None,
    include: Annotated[Path | None, typer.Option("--include", help="folder with task files for the harness")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=2, help="items of each benchmark at most")] = None,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """A run and its base, or one model, on benchmarks."""
    from tunesmith.bench import bench as run_bench
    from tunesmith.texts import bench_text

    tasks = [name.strip() for name in (harness or "").split(",") if name.strip()]
    document = run_bench(
        model,
        files=file or [],
        tasks=tasks,
        include=include,
        rows=rows,
        workspace=space_of(workspace),
        on_progress=say,
    )
    print_result(document, as_json=as_json, text=lambda: bench_text(document))


@app.command()
def advise(
    run: Annotated[str, typer.Argument(help="a run, or the recipe of a finished one")],
    rows: Annotated[int | None, typer.Option("--rows", min=2, help="at most this many rows")] = None,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """Prompt, look up, tune, or both: all of them on the same rows, and what would change the advice."""
    from tunesmith.advice import advise as run_advise
    from tunesmith.advice import find_named
    from tunesmith.texts import advice_text

    space = space_of(workspace)
    document = run_advise(find_named(run, workspace=space), workspace=space, rows=rows, on_progress=say)
    print_result(document, as_json=as_json, text=lambda: advice_text(document))


@app.command()
def runs(workspace: WorkspaceOption = None, as_json: Json = False) -> None:
    """All runs of the workspace, newest first."""
    from tunesmith.registry.compare import runs_table, runs_text

    found = runs_table(_index(workspace))
    print_result([r.as_dict() for r in found], as_json=as_json, text=lambda: runs_text(found))


@app.command()
def show(run: RunArgument, workspace: WorkspaceOption = None, as_json: Json = False) -> None:
    """One run: its numbers, its data and base down to their bytes, its verdict."""
    from tunesmith.registry.compare import show_run

    details = show_run(space_of(workspace).find_run(run), _index(workspace))
    print_result(details.as_dict(), as_json=as_json, text=details.as_text)


@app.command()
def compare(
    run: RunArgument,
    other: Annotated[str, typer.Argument(help="the other run")],
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """What differs between two runs' recipes and results."""
    from tunesmith.registry.compare import compare_runs

    space = space_of(workspace)
    comparison = compare_runs(space.find_run(run), space.find_run(other))
    print_result(comparison.as_dict(), as_json=as_json, text=comparison.as_text)


@app.command()
def combine(
    runs: Annotated[list[str], typer.Argument(help="two or more runs of one base")],
    how: Annotated[str, typer.Option("--how", help="linear, ties, dare_linear or dare_ties")],
    weights: Annotated[str | None, typer.Option("--weights", help="one a run, such as 0.5,0.5; the average")] = None,
    density: Annotated[float | None, typer.Option("--density", help="share that ties and dare keep; 0.5")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="of an adapter; what `how` needs by default")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="of what dare drops; 0")] = None,
    name: Annotated[str, typer.Option("--name", help="the new run's name")] = "combined",
    rows: Annotated[int | None, typer.Option("--rows", min=2, help="at most this many rows of each task")] = None,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """Make one run of several, and measure what it costs on each of their tasks."""
    from tunesmith.api import combine as run_combine
    from tunesmith.combination import parse_weights
    from tunesmith.combining import read_combination
    from tunesmith.texts import combination_text

    run = run_combine(
        runs,
        how=how,
        weights=parse_weights(weights),
        density=density,
        rank=rank,
        seed=seed,
        name=name,
        rows=rows,
        workspace=space_of(workspace),
        on_progress=say,
    )
    document = read_combination(run)
    print_result(document, as_json=as_json, text=lambda: combination_text(document))


@app.command()
def report(run: RunArgument, workspace: WorkspaceOption = None, as_json: Json = False) -> None:
    """Write a run's report.html again."""
    from tunesmith.evaluate.report import write_report

    path = write_report(space_of(workspace).find_run(run))
    print_result({"report": str(path)}, as_json=as_json, text=lambda: str(path))


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str | None, typer.Argument(help="the prompt; standard input by default")] = None,
    system: Annotated[str | None, typer.Option("--system", help="a system prompt; the recipe's by default")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    use_base: Annotated[bool, typer.Option("--base", help="let the base answer instead")] = False,
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """The tuned model's answer to one prompt, or what its head says of a text."""
    from tunesmith.chat import answer
    from tunesmith.texts import prediction_text

    text = prompt if prompt is not None else sys.stdin.read().rstrip("\n")
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    result = answer(run, prompt=text, system=system, sampling=sampling, base=use_base, workspace=space_of(workspace))
    print_result(result, as_json=as_json, text=lambda: prediction_text(result))


@app.command()
def chat(
    run: RunArgument,
    system: Annotated[str | None, typer.Option("--system", help="a system prompt; the recipe's by default")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    workspace: WorkspaceOption = None,
) -> None:
    """Talk with the tuned model; answers stream. /reset forgets, /quit or Ctrl-D ends."""
    from tunesmith.chat import converse

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    converse(run, system=system, sampling=sampling, workspace=space_of(workspace))


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", help="a new folder")],
    form: Annotated[str, typer.Option("--format", help="peft or merged")] = "merged",
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """Write the tuned model for use elsewhere, and check that it is the same model."""
    from tunesmith.api import export as run_export

    path = run_export(run, form=form, out=out, workspace=space_of(workspace), on_message=say)
    print_result(
        {"path": str(path), "format": form}, as_json=as_json, text=lambda: f"{path} ({form}; logits equal the run's)"
    )


def _index(workspace: Path | None) -> Any:
    from tunesmith.registry.index import Index
    from tunesmith.registry.store import Store

    space = space_of(workspace)
    return Index(space.index, store=Store(space.store))


def _process_number() -> int:
    """Which of the processes that torchrun started this is; 0 where there are no others."""
    return int(os.environ.get("RANK", "0"))


def _fail(message: str, hint: str, status: int) -> NoReturn:
    which = f" in process {number}" if (number := _process_number()) else ""
    hint = " ".join(hint.split()) or "tunesmith --help lists the commands"
    say(f"error{which}: {' '.join(message.split())}\nhint: {hint}")
    sys.exit(status)


def _tolerant_streams() -> None:
    """Bytes that are no text come in marked, and characters that the terminal lacks go out as escapes."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _run() -> int:
    """Run the command that the arguments name; returns its status."""
    command = typer.main.get_command(app)
    try:
        # not app(): it makes status 130 of every KeyboardInterrupt, and Interrupted is one that says more
        with command.make_context("tunesmith", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that what is half written is removed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run a command and turn every foreseen error into two lines and an exit status."""
    _tolerant_streams()
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        with _terminable():
            status = _run()
        sys.stdout.flush()  # here, where a reader that is gone is no error
    except Interrupted as error:
        say(f"\n{error.message}")
        say(f"hint: {error.hint}")
        status = 128 + error.signal_number
    except ElsewhereError:  # the process that it happened in says it
        status = 2
    except TunesmithError as error:
        _fail(str(error), error.hint, 2)
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            say(error.format_message())
            sys.exit(2)
        where = f"{error.ctx.command_path} --help" if error.ctx else "tunesmith --help"
        _fail(error.format_message(), f"{where} shows how it is called", 2)
    except (KeyboardInterrupt, typer.Abort) as stop:
        say("\nstopped")
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # what is still to be written at exit has no reader either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


if __name__ == "__main__":
    main()
