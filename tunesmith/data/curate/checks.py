"""Which checks there are, what each needs, and what each may find; each runs alone, or all together."""

import importlib.util
from dataclasses import dataclass

from tunesmith.data.curate.base import Check
from tunesmith.data.curate.contamination import Contamination
from tunesmith.data.curate.difficulty import Difficulty, Scorer
from tunesmith.data.curate.label_errors import LabelErrors
from tunesmith.data.curate.labels import Labels
from tunesmith.data.curate.language import Language
from tunesmith.data.curate.names import Names
from tunesmith.data.curate.personal import Personal
from tunesmith.data.curate.protected import Protected
from tunesmith.data.curate.quality import Quality
from tunesmith.data.curate.repeated import Again, Repeated
from tunesmith.data.curate.semantic import Embed, SemanticRepeats
from tunesmith.data.curate.special import SpecialTokens
from tunesmith.data.settings import DataSettings
from tunesmith.errors import MissingExtraError, RecipeError

PLAIN: dict[str, type[Check]] = {
    "special_tokens": SpecialTokens,
    "personal": Personal,
    "labels": Labels,
    "quality": Quality,
    "language": Language,
    "label_errors": LabelErrors,
}  # those that are made from nothing
NAMES = (*PLAIN, "duplicates", "contamination", "protected", "semantic", "difficulty")
EXTRAS = {"language": "py3langid", "label_errors": "sklearn"}  # the module that each needs
LEFT_OUT_BY = {  # for each kind that data.leave_out may name, the check that finds it
    "near_duplicate": "duplicates",
    "contradiction": "duplicates",
    "contamination": "contamination",
    "protected_text": "protected",
    "quality": "quality",
    "language": "language",
    "label_error": "label_errors",
}


@dataclass(frozen=True)
class Models:
    """What models say of rows, for the checks that need one: each None where none is named."""

    embed: Embed | None = None  # for rows that say the same (semantic.py)
    scorer: Scorer | None = None  # for how hard rows are (difficulty.py)
    names: Names | None = None  # for names among the personal data (names.py)


NO_MODELS = Models()


@dataclass(frozen=True)
class Chosen:
    """The checks to run, by name, and why others do not."""

    checks: dict[str, Check]
    not_run: dict[str, str]


def choose(
    settings: DataSettings,
    *,
    again: Again,
    only: tuple[str, ...] | None = None,
    models: Models = NO_MODELS,
) -> Chosen:
    """All checks that can run, or those of `only`.

    `settings` name the benchmarks and the protected texts. Raises RecipeError where `only` names no check or one that needs
    what is not given, MissingExtraError for a missing extra.
    """
    if unknown := [name for name in only or () if name not in NAMES]:
        raise RecipeError(f"there is no check '{unknown[0]}'", hint=f"there are {', '.join(NAMES)}")
    checks: dict[str, Check] = {}
    not_run: dict[str, str] = {}
    for name in NAMES if only is None else dict.fromkeys(only):
        why = _missing(name, settings=settings, models=models)
        if why is None:
            checks[name] = _check(name, settings=settings, again=again, models=models)
        elif only is None:
            not_run[name] = why
        else:
            raise (MissingExtraError if name in EXTRAS else RecipeError)(f"the check '{name}' cannot run", hint=why)
    return Chosen(checks, not_run)


def _missing(name: str, *, settings: DataSettings, models: Models) -> str | None:
    """What to give so that a check can run; None where it can."""
    if name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
        return "pip install 'tunesmith[curate]'"
    if name == "contamination" and not settings.benchmarks:
        return "name evaluation files with --benchmark or data.benchmarks"
    if name == "semantic" and models.embed is None:
        return "name an encoder with --embedder"
    if name == "difficulty" and models.scorer is None:
        return "takes a pass of the base over all rows; ask for it with --only difficulty"
    return None


def _check(name: str, *, settings: DataSettings, again: Again, models: Models) -> Check:
    if name == "personal":
        return Personal(models.names)
    if name == "duplicates":
        return Repeated(again)
    if name == "contamination":
        return Contamination(settings.benchmarks, settings)
    if name == "protected":
        return Protected(settings.protected)
    if name == "semantic":
        assert models.embed is not None
        return SemanticRepeats(models.embed)
    if name == "difficulty":
        assert models.scorer is not None
        return Difficulty(models.scorer)
    return PLAIN[name]()
