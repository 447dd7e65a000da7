"""A run's own vocabulary: the tokenizer extended for its training rows, and what that does to held-out text.

The rows are read, split and checked with the base's tokenizer first, so nothing is learned from a row that is held out. What
was learned is kept in the cache by the hash of those rows; the run's `vocabulary.json` says what it is and what it gains.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.extend import (
    check_extends,
    check_extensible,
    count_words,
    extended,
    fertility,
    first_new_id,
    learn_tokens,
    old_pieces,
)
from tunesmith.data.prepared import Prepared
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example
from tunesmith.errors import StorageError
from tunesmith.models.extended import extend_tables, fold_tables
from tunesmith.models.load import Model
from tunesmith.recipe import Recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.runs import VOCABULARY, Run, prepare_data
from tunesmith.storage import new_folder, read_json, sha256_file, write_json

NUM_SHOWN = 20


@dataclass(frozen=True)
class Growth:
    """New tokens of a run: how many, the old ids that spell each, and what vocabulary.json says."""

    num_new: int
    first: int
    pieces: list[list[int]]
    document: dict[str, Any]

    def extend(self, model: Model, *, whole: bool) -> None:
        """Give the model rows for them: apart from the base's, or in the same tables where the `whole` model is saved."""
        extend_tables(model, first=self.first, num_new=self.num_new, pieces=self.pieces)
        if whole:
            fold_tables(model)

    def write(self, run: Path) -> None:
        """vocabulary.json."""
        write_json(run / VOCABULARY, value=self.document)


def grow_tokenizer(
    recipe: Recipe,
    *,
    model: Model,
    workspace: Workspace,
    template: ChatTemplate | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> Growth | None:
    """Extend the model's tokenizer as the recipe says; None, and nothing is done, where it asks for no new token.

    ModelError where the tokenizer is of a kind that cannot be extended, RecipeError where the rows hold too few tokens.
    """
    num_new = recipe.objective.num_new_tokens
    if not num_new:
        return None
    old = model.tokenizer
    check_extensible(old)
    plain = recipe.objective.model_copy(update={"new_tokens": None})
    prepared = prepare_data(
        recipe.model_copy(update={"objective": plain}), model=model, workspace=workspace, template=template
    )
    folder = workspace.cache / "vocabularies" / f"{prepared.digest[:32]}-{num_new}"
    if not (folder / VOCABULARY).is_file():
        on_message(f"learning {num_new:,} new tokens from the training rows")
        with new_folder(folder, replace=False) as new:
            tokenizer, document = _learn(prepared, tokenizer=old, num_new=num_new)
            (new / "tokenizer.json").write_text(tokenizer.backend.to_str(), "utf-8")
            write_json(new / VOCABULARY, value=document)
    tokenizer = Tokenizer(
        Tokenizer.from_folder(folder).backend, old.config, old.chat_template, old.folder
    )  # its configuration and template are the base's
    model.tokenizer = tokenizer
    pieces = old_pieces(tokenizer, old=old)
    return Growth(num_new, first_new_id(old), pieces, read_json(folder / VOCABULARY))


def _learn(prepared: Prepared, *, tokenizer: Tokenizer, num_new: int) -> tuple[Tokenizer, dict[str, Any]]:
    words = count_words(_texts(prepared.examples("train")), tokenizer=tokenizer)
    tokens = learn_tokens(words, tokenizer=tokenizer, num_new=num_new)
    larger = extended(tokenizer, tokens=tokens)
    held = next((side for side in ("validation", "test") if any(True for _ in prepared.examples(side))), "train")
    before, after = (fertility(_texts(prepared.examples(held)), tokenizer=t).as_dict() for t in (tokenizer, larger))
    first = first_new_id(tokenizer)
    document = {
        "new_tokens": num_new,
        "first_id": first,
        "tokens": larger.num_tokens,
        "learned_from_words": sum(words.values()),
        "different_words": len(words),
        "measured_on": held,
        "before": before,
        "after": after,
        "first_tokens": [larger.decode([index]) for index in range(first, first + min(num_new, NUM_SHOWN))],
    }
    return larger, document


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    return (example.text for example in examples if example.text is not None)


def restore_vocabulary(run: Run, *, model: Model, rows: bool) -> None:
    """Give a loaded model the run's own tokenizer, and (with `rows`) room for its new rows. Nothing to do without any.

    StorageError where the run's tokenizer is not the one that was saved, ModelError where it is not the base's extended.
    """
    num_new = run.recipe.objective.num_new_tokens
    if not num_new:
        return
    folder = run.path / "model"
    recorded = read_json(run.path / VOCABULARY).get("tokenizer_sha256")
    if not (folder / "tokenizer.json").is_file() or sha256_file(folder / "tokenizer.json") != recorded:
        raise StorageError(
            f"the tokenizer is no longer the one that {run.name} was trained with",
            file=folder / "tokenizer.json",
            hint="restore the file: new tokens mean nothing without it",
        )
    if rows:
        tokenizer, old = Tokenizer.from_folder(folder), model.tokenizer
        check_extends(tokenizer, old=old)
        extend_tables(model, first=first_new_id(old), num_new=num_new)  # the rows themselves are in the adapter
        model.tokenizer = tokenizer


def record_tokenizer(run: Path) -> None:
    """Enter the hash of the saved tokenizer into vocabulary.json, where there is one."""
    path = run / VOCABULARY
    if path.is_file():
        write_json(path, value=read_json(path) | {"tokenizer_sha256": sha256_file(run / "model" / "tokenizer.json")})
