"""`data check`: a file looked at with a base's tokenizer, template and context length."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.check import CheckReport, CountTokens, check_file
from tunesmith.data.curate.checks import Models
from tunesmith.data.curate.difficulty import Scorer
from tunesmith.data.curate.drift import Drift, drift_of
from tunesmith.data.curate.names import Names
from tunesmith.data.curate.semantic import Embed
from tunesmith.data.prepare import usable
from tunesmith.data.settings import DataSettings
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Example
from tunesmith.errors import NotFoundError, RecipeError
from tunesmith.models.base import context_tokens, read_config, resolve_base, template_for
from tunesmith.storage import write_text

if TYPE_CHECKING:
    from tunesmith.recipe import Recipe


def read_template(path: Path) -> str:
    """The source of `data.template`."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(
            f"the chat template cannot be read: {error}", file=path, hint="check data.template"
        ) from None


def check_data(
    file: str,
    *,
    against: str | None = None,
    base: str = "starter",
    recipe: "Recipe | Path | None" = None,
    only: tuple[str, ...] | None = None,
    benchmarks: tuple[str, ...] = (),
    protected: str | None = None,
    embedder: str | None = None,
    names: str | Names | None = None,
    scores: Path | None = None,
) -> CheckReport:
    """What is in `file`, what is wrong with it, what would be trained.

    What the check `difficulty` says of each row is written to `scores`, a JSON object a line.
    Torch is needed alone for an `embedder`, for `names` (a model, or what was loaded of one) and for the check `difficulty`,
    whose scores are those of `base`.
    """
    if names is not None and only is not None and "personal" not in only:
        raise RecipeError("--names has no effect without the check 'personal'", hint="--only personal")
    if scores is not None and "difficulty" not in (only or ()):
        raise RecipeError("--scores has no effect without the check 'difficulty'", hint="--only difficulty")
    settings: DataSettings | None = None
    taken = 0  # tokens of the context that the method takes for itself
    labels: tuple[str, ...] | None = None  # whose names are answers to choose from
    if recipe is not None:
        from tunesmith.recipe import load_recipe

        loaded = load_recipe(recipe) if isinstance(recipe, Path) else recipe
        settings, taken = loaded.data, loaded.method.num_virtual_tokens
        base = loaded.base if isinstance(loaded.base, str) else base
        names = names or settings.names
    persons = _names(names) if isinstance(names, str) else names
    if recipe is not None:
        labels = _labels_in_words(loaded, names=None if loaded.data.names is None else persons)
    folder = resolve_base(base)
    source = read_template(Path(settings.template)) if settings and settings.template else None
    config = read_config(folder / "config.json")
    template = template_for(Tokenizer.from_folder(folder), config=config, source=source)
    count_words = None if labels is None else _counting_words(labels, template=template)
    limit = (settings.max_tokens if settings else None) or context_tokens(folder) - taken

    def count(examples: list[Example]) -> list[tuple[int, int]]:
        """(tokens of the longest sequence, trained tokens) of each; long plain texts become windows."""
        conversations = iter(template.sequences([e for e in examples if e.plain_text is None]))
        texts = iter(template.tokenizer.encode_text([t for e in examples if (t := e.plain_text) is not None]))
        counts = []
        for example in examples:
            if example.plain_text is not None:
                num_tokens = len(next(texts)) + len(template.tokenizer.begin_ids) + 1
                windows = example.label is None
                counts.append((min(limit, num_tokens), num_tokens - 1) if windows else (num_tokens, 1))
            else:
                sequences = next(conversations)
                counts.append((max(s.num_context_tokens for s in sequences), sum(s.num_targets for s in sequences)))
        return counts

    settings = settings or DataSettings(train=file)
    if benchmarks or protected is not None:
        given = {"benchmarks": list(benchmarks) or settings.benchmarks, "protected": protected or settings.protected}
        settings = settings.model_copy(update=given)
    report = check_file(
        file,
        against=against,
        settings=settings,
        count_tokens=count_words or count,
        max_tokens=limit,
        only=only,
        models=Models(
            embed=None if embedder is None else _embed(embedder),
            scorer=_scorer(base, template=template) if "difficulty" in (only or ()) else None,
            names=persons,
        ),
    )
    if scores is not None:
        assert report.scored is not None
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in report.scored.rows())
        write_text(scores, text="".join(rows))
    return report


def drift_from(file: str, *, like: str, recipe: Path | None = None) -> Drift:
    """Whether the prompts of `file` look like those of `like`."""
    from tunesmith.recipe import load_recipe

    return drift_of(file, like, settings=None if recipe is None else load_recipe(recipe).data)


def _embed(base: str) -> Embed:
    from tunesmith.models.embed import load_embedder

    return load_embedder(base)


def _scorer(base: str, *, template: ChatTemplate) -> Scorer:
    from tunesmith.evaluate.difficulty import scorer
    from tunesmith.models.load import load_model

    return Scorer(scorer(load_model(base), template=template))


def _names(base: str) -> Names:
    from tunesmith.models.names import load_names

    return load_names(base)


def _labels_in_words(recipe: "Recipe", *, names: Names | None) -> tuple[str, ...] | None:
    """The classes of the recipe's rows where their names are what is trained."""
    from tunesmith.objectives.label_words import LabelWords

    if not isinstance(recipe.objective, LabelWords):
        return None
    return recipe.objective.fitted(usable(recipe.data, names=names)).labels


def _counting_words(labels: tuple[str, ...], *, template: ChatTemplate) -> CountTokens:
    """Counts the prompt with the longest name behind it, and the tokens of that."""
    from tunesmith.objectives.label_words import in_words, names_of, prompt_of

    longest = max(map(len, names_of(labels, template=template)))

    def count(examples: list[Example]) -> list[tuple[int, int]]:
        prompts = [prompt_of(in_words(e), template=template) for e in examples]
        return [(len(prompt) + longest, longest) for prompt in prompts]

    return count
