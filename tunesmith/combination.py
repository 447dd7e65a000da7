"""What is to be combined and how, checked against what the run folders say: no model is loaded for it."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.contract import FILE as CONTRACT
from tunesmith.errors import RecipeError
from tunesmith.methods.combine import DENSITY, DRAWN, WAYS, Way, check_combinable
from tunesmith.methods.lora import Lora
from tunesmith.objectives.headed import Headed
from tunesmith.runs import Run, check_finished
from tunesmith.storage import read_json


@dataclass(frozen=True)
class Plan:
    """Which runs are combined and how; checked, and every default filled in. `density` and `seed` where they count."""

    runs: tuple[Run, ...]
    how: Way
    weights: tuple[float, ...]
    density: float | None
    rank: int | None
    seed: int | None

    @property
    def whole(self) -> bool:
        """Whether a run moved the base's own weights, so that the result is a whole model."""
        return any(not isinstance(run.recipe.method, Lora) for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """As combination.json and resolved.json have it."""
        return {
            "how": self.how,
            "runs": [
                {"run": run.name, "path": str(run.path), "weight": weight}
                for run, weight in zip(self.runs, self.weights, strict=True)
            ],
            "density": self.density,
            "rank": self.rank,
            "seed": self.seed,
        }

    def as_text(self) -> str:
        """In a line."""
        of = ", ".join(f"{run.name} ({weight:g})" for run, weight in zip(self.runs, self.weights, strict=True))
        settings = {"density": self.density, "rank": self.rank, "seed": self.seed}
        return f"{self.how} of {of}" + "".join(f"; {k} {v:g}" for k, v in settings.items() if v is not None)


def check_same_base(runs: Sequence[Run]) -> None:
    """Every run has a model, stands here once, and was tuned from the first one's base. RecipeError, NotFoundError."""
    seen: set[Path] = set()
    for run in runs:
        check_finished(run)
        if run.path.resolve() in seen:
            raise RecipeError(f"{run.name} is named twice", hint="name each run once, and give it a larger weight")
        seen.add(run.path.resolve())
    first, digest = runs[0], runs[0].resolved["hashes"]["base"]
    for run in runs[1:]:
        if (other := run.resolved["hashes"]["base"]) != digest:
            raise RecipeError(
                f"{run.name} was tuned from the base '{run.recipe.base}' ({other[:12]}) and {first.name} from "
                f"'{first.recipe.base}' ({digest[:12]}): an adapter fits the weights it was made for alone",
                hint="use runs of one base",
            )


def parse_weights(text: str | None) -> list[float] | None:
    """Numbers between commas; RecipeError for anything else."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights {text!r} are no numbers between commas", hint="such as 0.5,0.5") from None


def plan_combination(
    runs: Sequence[Run],
    *,
    how: str,
    weights: Sequence[float] | None,
    density: float | None,
    rank: int | None,
    seed: int | None,
) -> Plan:
    """Check what is asked for against what the run folders say. RecipeError names what does not fit."""
    if how not in WAYS:
        near = difflib.get_close_matches(how, WAYS, n=1)
        raise RecipeError(
            f"there is no way to combine called '{how}'; there are {', '.join(WAYS)}",
            hint=f"did you mean '{near[0]}'?" if near else "linear is a weighted sum",
        )
    if len(runs) < 2:
        raise RecipeError(f"{len(runs)} run is given, and combining takes two or more", hint="name another run")
    check_same_base(runs)
    for run in runs:
        check_combinable(run.recipe.method, run=run.name)
        check_plain(run)
        if isinstance(run.recipe.objective, Headed):
            raise RecipeError(
                f"{run.name} was tuned for {run.recipe.objective.kind_name}, and its calibration fits its own weights alone",
                hint="switch between the runs: api.load_several",
            )
    _check_contracts(runs)
    if density is not None and how == "linear":
        raise RecipeError("density has no effect on linear, which drops nothing", hint="leave it out, or --how ties")
    if density is not None and not 0 < density <= 1:
        raise RecipeError(f"density is {density:g}, the share that is kept: above 0 and at most 1", hint="such as 0.5")
    if seed is not None and how not in DRAWN:
        raise RecipeError(f"seed has no effect on {how}, which draws nothing", hint=f"leave it out, or {DRAWN[0]}")
    plan = Plan(
        runs=tuple(runs),
        how=how,
        weights=_checked_weights(weights, runs=runs),
        density=None if how == "linear" else DENSITY if density is None else density,
        rank=rank,
        seed=(seed or 0) if how in DRAWN else None,
    )
    if plan.whole and rank is not None:
        raise RecipeError("rank has no effect where a run moved the base's own weights", hint="leave it out")
    return plan


def _checked_weights(weights: Sequence[float] | None, *, runs: Sequence[Run]) -> tuple[float, ...]:
    """One for each run; an average by default."""
    if weights is None:
        return (1 / len(runs),) * len(runs)
    if len(weights) != len(runs):
        raise RecipeError(
            f"{len(weights)} weights are given for {len(runs)} runs", hint="give one for each run, in their order"
        )
    for run, weight in zip(runs, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            raise RecipeError(
                f"the weight of {run.name} is {weight:g}; a weight is a number other than 0",
                hint="leave that run out",
            )
    return tuple(weights)


def _check_contracts(runs: Sequence[Run]) -> None:
    """The same tokenizer and chat template, since the combination has one of each."""
    contracts = [read_json(run.path / CONTRACT) for run in runs]
    for key, what in (("template_sha256", "chat template"), ("tokenizer", "tokenizer")):
        for run, contract in zip(runs, contracts, strict=True):
            if contract[key] != contracts[0][key]:
                raise RecipeError(
                    f"{run.name} was tuned with another {what} than {runs[0].name}",
                    file=run.path / CONTRACT,
                    hint="combine runs that read conversations alike, or switch between them: api.load_several",
                )


def check_plain(run: Run) -> None:
    """RecipeError where the run has a head or tokens of its own, which no other run's adapter fits."""
    if run.recipe.objective.num_new_tokens:
        raise RecipeError(f"{run.name} has tokens of its own (new_tokens)", hint="load it alone: api.load")
    if run.recipe.objective.num_outputs:
        raise RecipeError(
            f"{run.name} was tuned for {run.recipe.objective.kind_name} and has a head of its own",
            hint="load it alone: api.load",
        )
