"""The commands below `tunesmith data`."""

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli_options import Json, RecipeArgument, Set, WorkspaceOption, print_result, say, space_of

data_app = typer.Typer(help="Look at data and prepare it.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command("check")
def data_check(
    file: Annotated[str, typer.Argument(help="a file, a folder or a hub data set")],
    against: Annotated[str | None, typer.Option("--against", help="a second file: which rows are in both?")] = None,
    base: Annotated[str, typer.Option("--base", help="whose tokenizer and context length count")] = "starter",
    recipe: Annotated[Path | None, typer.Option("--recipe", help="read the rows as this recipe says")] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="checks to run, separated by commas; all by default")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option("--benchmark", help="an evaluation file: which rows hold its texts?")
    ] = None,
    protected: Annotated[
        str | None, typer.Option("--protected", help="a folder of texts: which rows hold passages of them?")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option("--embedder", help="an encoder: which rows say the same in other words?")
    ] = None,
    names: Annotated[
        str | None, typer.Option("--names", help="a model that tags persons: which rows hold names?")
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", help="a file of real prompts: are the rows' prompts like these?")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="write what --only difficulty says of each row, as JSON Lines")
    ] = None,
    as_json: Json = False,
) -> None:
    """What is in a file, what is wrong with it, and what would be trained."""
    from tunesmith.checks import check_data, drift_from

    if like is not None:
        drift = drift_from(file, like=like, recipe=recipe)
        print_result(drift.as_dict(), as_json=as_json, text=drift.as_text)
        return
    report = check_data(
        file,
        against=against,
        base=base,
        recipe=recipe,
        only=None if only is None else tuple(name.strip() for name in only.split(",")),
        benchmarks=tuple(benchmark or ()),
        protected=protected,
        embedder=embedder,
        names=names,
        scores=scores,
    )
    print_result(report.as_dict(), as_json=as_json, text=report.as_text)
    if report.num_errors:
        raise typer.Exit(3)


@data_app.command("prepare")
def data_prepare(
    recipe: RecipeArgument, overrides: Set = None, workspace: WorkspaceOption = None, as_json: Json = False
) -> None:
    """Read, split, render and count the rows of a recipe; nothing is trained."""
    from tunesmith.models.load import load_model
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import check_suits, prepare_data
    from tunesmith.texts import ledger_text
    from tunesmith.vocabulary import grow_tokenizer

    loaded, space = load_recipe(recipe, overrides=overrides), space_of(workspace)
    check_suits(loaded)
    model = load_model(loaded.base)
    growth = grow_tokenizer(loaded, model=model, workspace=space, on_message=say)
    prepared = prepare_data(loaded, model=model, workspace=space)
    validation = prepared.validation
    document = {
        "folder": str(prepared.folder),
        "digest": prepared.digest,
        "ledger": prepared.ledger,
        "train": {
            "rows": len(prepared.train),
            "tokens": prepared.train.num_tokens,
            "targets": prepared.train.num_targets,
        },
        "validation": {"rows": len(validation) if validation else 0},
    }
    if growth is not None:
        document["vocabulary"] = growth.document
    print_result(document, as_json=as_json, text=lambda: ledger_text(document))


@data_app.command("card")
def data_card(
    recipe: RecipeArgument,
    overrides: Set = None,
    out: Annotated[Path, typer.Option("--out", help="the page; the same as JSON is written beside it")] = Path(
        "data-card.html"
    ),
    workspace: WorkspaceOption = None,
    as_json: Json = False,
) -> None:
    """Describe the rows of a recipe on one page: origin, counts, lengths, classes, findings, a sample."""
    from tunesmith.data_card import write_card

    document = write_card(recipe, out=out, workspace=space_of(workspace), overrides=overrides, on_message=say)
    print_result(document, as_json=as_json, text=lambda: f"{document['sentence']}\ncard: {out}")
