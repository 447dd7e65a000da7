"""The scores of groups of rows: by a column, or by words in the prompt; and whether two groups are scored alike.

Every pair of groups is compared on the rows that are in one of the two alone; p is that of a permutation test, corrected for
the number of pairs (Holm 1979). A gap says that a system does worse on one group's rows, not why: they may be harder. What
the base makes of the same rows stands beside it.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.answers import Floats
from tunesmith.data.types import Example
from tunesmith.errors import DataError
from tunesmith.evaluate.metric import Metric
from tunesmith.evaluate.settings import GroupSettings
from tunesmith.evaluate.statistics import SIGNIFICANCE, count_text, decimals, holm, interval, p_text
from tunesmith.evaluate.texts import as_text
from tunesmith.evaluate.unpaired import apart, side_permutation
from tunesmith.evaluate.words import asked_text, read_groups

LEAST_ROWS = 10  # of a group that is compared
MAX_COMPARED = 20  # groups, the largest ones
Members = dict[str, NDArray[np.bool_]]
Scores = dict[str, dict[str, Floats]]
Metrics = Mapping[str, Metric]
Gaps = dict[tuple[str, str], dict[str, Any]]  # by metric and system


def by_group(
    scores: Scores, *, metrics: Metrics, examples: list[Example], settings: GroupSettings, seed: int
) -> dict[str, Any]:
    """The document's entry `groups`; `scores` by metric and system, a row an example.

    Raises DataError where no row is in a group.
    """
    members = _members(examples, settings=settings)
    sizes = {group: int(member_B.sum()) for group, member_B in members.items()}
    large = [group for group in sizes if sizes[group] >= LEAST_ROWS][:MAX_COMPARED]
    gaps = _gaps(scores, metrics=metrics, members={group: members[group] for group in large}, seed=seed)
    entries = {
        name: _by_system(by_system, metric=metrics[name], members=members, gaps=gaps, seed=seed)
        for name, by_system in scores.items()
    }
    metric = next(iter(scores))
    system, first = next(iter(entries[metric]["systems"].items()))
    return {
        "by": settings.column or settings.words,
        "rows": sizes,
        "compared": large,
        "without_group": int((~np.any(list(members.values()), axis=0)).sum()),
        "metrics": entries,
        "sentence": _sentence(first["gap"], metric=metric, system=system, sizes=sizes),
    }


def _by_system(scores: dict[str, Floats], *, metric: Metric, members: Members, gaps: Gaps, seed: int) -> dict[str, Any]:
    """What the document says of a metric."""
    systems = {
        system: {
            "groups": {group: _scored(rows[of_B], metric=metric, seed=seed) for group, of_B in members.items()},
            "gap": gaps.get((metric.name, system)),
        }
        for system, rows in scores.items()
    }
    return {"higher_is_better": metric.higher_is_better, "systems": systems}


def _members(examples: list[Example], *, settings: GroupSettings) -> Members:
    """Which rows each group has, [B] bool, the largest group first; a row whose column holds a list is in several."""
    if settings.words is not None:
        patterns = read_groups(settings.words)
        asked = [asked_text(example) for example in examples]
        found = [{group for group, pattern in patterns.items() if pattern.search(text)} for text in asked]
        missing = f"no held-out row has a word of {settings.words}"
    else:
        assert settings.column is not None
        found = [_values(example.columns.get(settings.column)) for example in examples]
        missing = f"no held-out row has the column {settings.column!r}"
    if not any(found):
        raise DataError(missing, file=examples[0].origin.file, hint="mend evaluate.groups")
    names = sorted(set().union(*found))
    members = {name: np.array([name in of_row for of_row in found]) for name in names}
    return dict(sorted(members.items(), key=lambda item: -int(item[1].sum())))


def _values(content: Any) -> set[str]:
    """The groups that a column names: its value, or each of a list; none of null."""
    values = content if isinstance(content, list) else [content]
    return {as_text(value) for value in values if value is not None}


def _scored(rows: Floats, *, metric: Metric, seed: int) -> dict[str, float]:
    """A score with its interval; of a single row the score alone."""
    aggregate = metric.aggregate
    return {"value": aggregate(rows)} if len(rows) == 1 else interval(rows, aggregate=aggregate, seed=seed).as_dict()


def _gaps(scores: Scores, *, metrics: Metrics, members: Members, seed: int) -> Gaps:
    """For each metric and system the largest gap between two groups; nothing where no two can be compared."""
    keys = [(metric, system) for metric, by_system in scores.items() for system in by_system]
    pairs: list[tuple[str, str]] = []
    p_by_pair: list[list[float]] = []
    for one, other in combinations(members, 2):
        alone_B = members[one] ^ members[other]
        first_B = members[one][alone_B]
        if min(first_B.sum(), (~first_B).sum()) < LEAST_ROWS:
            continue
        scored = [(scores[metric][system][alone_B], metrics[metric].aggregate) for metric, system in keys]
        pairs.append((one, other))
        p_by_pair.append(side_permutation(scored, first_B=first_B, seed=seed))
    if not pairs:
        return {}
    found: Gaps = {}
    for number, (metric, system) in enumerate(keys):
        adjusted = holm([p[number] for p in p_by_pair])
        rows, aggregate = scores[metric][system], metrics[metric].aggregate
        sides = [(rows[members[a] & ~members[b]], rows[members[b] & ~members[a]]) for a, b in pairs]
        distance = [aggregate(first) - aggregate(second) for first, second in sides]
        widest = max(range(len(pairs)), key=lambda i: abs(distance[i]))
        order = slice(None, None, 1 if distance[widest] >= 0 else -1)  # the higher score first
        higher, lower = sides[widest][order]
        difference = apart(higher, lower, aggregate=aggregate, seed=seed).as_dict()
        between = {"between": list(pairs[widest][order])}
        told_apart = [list(pair) for pair, p in zip(pairs, adjusted, strict=True) if p < SIGNIFICANCE]
        luck = {"p": adjusted[widest], "pairs": len(pairs), "told_apart": told_apart}
        found[metric, system] = between | difference | luck
    return found


def _sentence(gap: dict[str, Any] | None, *, metric: str, system: str, sizes: dict[str, int]) -> str:
    if gap is None:
        return f"no two groups have {LEAST_ROWS} rows or more that are in one of them alone: nothing is compared"
    places = decimals(gap["high"] - gap["low"])
    high, low = gap["between"]
    numbers = f"{gap['value']:.{places}f}, 95 % interval {gap['low']:.{places}f} to {gap['high']:.{places}f}"
    evidence = f"{numbers}, {p_text(gap['p'])}" + (f" corrected for {gap['pairs']} pairs" if gap["pairs"] > 1 else "")
    of = f"'{high}' ({count_text(sizes[high])}) and '{low}' ({count_text(sizes[low])})"
    if gap["p"] < SIGNIFICANCE:
        return f"{metric} of {system} differs between {of}: {evidence}"
    widest = f"the widest gap, between {of}, may be luck: {evidence}"
    if not gap["told_apart"]:
        return f"no two groups can be told apart on {metric} of {system}; {widest}"
    pairs = ", ".join(f"'{one}' and '{other}'" for one, other in gap["told_apart"])
    return f"{metric} of {system} differs between {pairs}; {widest}"
