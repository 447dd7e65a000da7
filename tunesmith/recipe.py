"""The recipe: one YAML file that says what a run is. This tree names the sections and owns none of their fields.

A setting that has no effect is an error: unknown keys, keys of another method, a patience without validation. Each error
names the line and the nearest valid name.
"""

import difflib
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tunesmith.data.settings import DataSettings, LookUpSettings, SelectSettings
from tunesmith.errors import NotFoundError, RecipeError
from tunesmith.evaluate.code import CODE_METRICS
from tunesmith.evaluate.own import is_own
from tunesmith.evaluate.settings import EvaluateSettings, GroupSettings
from tunesmith.methods import METHODS, AnyMethod
from tunesmith.methods.lora import Lora
from tunesmith.models.base import NewBase
from tunesmith.objectives import OBJECTIVES, AnyObjective
from tunesmith.objectives.causal import Causal
from tunesmith.objectives.classification import Classification
from tunesmith.objectives.headed import Headed
from tunesmith.objectives.instruction import Instruction
from tunesmith.registry.workspace import check_recipe_name
from tunesmith.train.settings import PlanSettings, TrainSettings


def _kind(value: Any) -> Any:
    """`lora` is short for `{kind: lora}`."""
    return {"kind": value} if isinstance(value, str) else value


def _name(value: str) -> str:
    """A name that a run can have."""
    try:
        check_recipe_name(value)
    except RecipeError as error:
        raise ValueError(error.message) from None
    return value


class Recipe(BaseModel):
    """What a run is: base, data, objective, method, training and evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, AfterValidator(_name)] = Field(default="run", description="the run's name")
    base: str | NewBase = Field(default="starter", description="`starter`, a local folder, or a hub name")
    data: DataSettings
    objective: Annotated[AnyObjective, BeforeValidator(_kind)] = Field(default_factory=Instruction)
    method: Annotated[AnyMethod, BeforeValidator(_kind)] = Field(default_factory=Lora)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    plan: PlanSettings = Field(default_factory=PlanSettings)

    def as_yaml(self) -> str:
        """What was set, as a recipe that reads back to this one."""
        values = self.model_dump(mode="json", exclude_unset=True) | {"name": self.name}
        for section in ("method", "objective"):
            values[section] = {"kind": getattr(self, section).kind} | values.get(section, {})
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @model_validator(mode="after")
    def _no_idle_setting(self) -> "Recipe":
        if self.data.validation is None:
            for name in ("patience", "validate_every"):
                if getattr(self.train, name) is not None:
                    raise ValueError(f"train.{name} has no effect because data.validation is null")
            if isinstance(self.objective, Classification) and self.objective.right_share is not None:
                raise ValueError("objective.right_share has no effect because data.validation is null")
        if self.train.general_limit is not None and self.evaluate.every is None:
            raise ValueError("train.general_limit needs evaluate.general and evaluate.every, which measure it")
        if self.data.replay is not None and not self.objective.replays:
            raise ValueError(
                f"data.replay has no place in objective '{self.objective.kind_name}', which learns no texts"
            )
        if self.data.look_up is not None and isinstance(self.objective, Headed | Causal):
            raise ValueError(
                "data.look_up puts passages or rows before questions,"
                f" and objective '{self.objective.kind_name}' answers none"
            )
        if self.data.replay is not None and self.data.replay == self.evaluate.general:
            raise ValueError(
                "data.replay is the file of evaluate.general, which must not be trained on: give two files"
            )
        asked = self.evaluate.metrics
        if "tests" in self.data.mapping and asked and not any(name in CODE_METRICS or is_own(name) for name in asked):
            raise ValueError(
                f"data.mapping.tests has no effect because evaluate.metrics does not name {CODE_METRICS[0]}"
            )
        per_token = "perplexity" in (self.evaluate.metrics or ()) and "base" in (self.evaluate.against or ("base",))
        if per_token and self.objective.num_new_tokens:
            raise ValueError(
                "evaluate.metrics has perplexity, which is a token's, and objective.new_tokens gives the run other tokens "
                "than its base: use bits_per_byte"
            )
        if isinstance(self.base, NewBase) and self.objective.teacher_base == BASE:
            raise ValueError("objective.teacher is the base, and this one is new: name a model that was trained")
        if isinstance(self.base, NewBase) and self.method.kind != "full":
            raise ValueError(
                f"method '{self.method.kind}' tunes a pre-trained base, and this one is new: use method: full"
            )
        return self


BASE = "base"  # as a teacher: the recipe's own base

SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict = 1, 3, 3


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads 2e-4 as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key, _ in node.value:
        name = loader.construct_object(key)
        if not isinstance(name, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is not a name", key.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{name}' stands here twice", key.start_mark)
        seen[name] = key.start_mark.line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load_recipe(path: Path, *, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe. Paths in it are relative to its folder.

    `overrides` are `a.b=value` strings, the value in YAML. Raises NotFoundError or RecipeError with file and line.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "write one with: tunesmith init --from FILE"
        raise NotFoundError("there is no such recipe", file=path, hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe cannot be read: {error}", file=path, hint="a recipe is a UTF-8 YAML file"
        ) from error
    return parse_recipe(text, file=path, overrides=overrides)


def parse_recipe(text: str, *, file: Path, overrides: list[str] | None = None) -> Recipe:
    """As `load_recipe`, from text; `file` names it in errors, and its folder is where relative paths start."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise RecipeError(f"no valid YAML: {error.problem}", file=file, line=line, hint="mend that line") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"no valid YAML: {error}", file=file, hint="a recipe is a YAML file") from error
    if not isinstance(value, dict):
        raise RecipeError(
            "a recipe is a mapping of sections", file=file, hint="it begins with base:, data:, method: ..."
        )
    for override in overrides or []:
        _set(value, override)
    if isinstance(value.get("name"), type(None)):
        value["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:64] or "run"
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise _recipe_error(error, value=value, node=node, file=file) from None
    return _resolved(recipe, folder=file.absolute().parent)


def _set(value: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"--set {override!r} is not of the form a.b=value", hint="for example --set train.epochs=2")
    *parents, leaf = name.strip().split(".")
    for parent in parents:
        below = value.setdefault(parent, {})
        if isinstance(below, str) and parent in ("method", "objective"):
            below = value[parent] = {"kind": below}
        if not isinstance(below, dict):
            raise RecipeError(f"--set {name}: '{parent}' is no section", hint="see docs/recipe.md for the names")
        value = below
    try:
        value[leaf] = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {name}: {text!r} is no YAML value", hint="quote it") from error


def _recipe_error(error: ValidationError, *, value: Any, node: Any, file: Path) -> RecipeError:
    """The first complaint in our words, with its line, and how many more there are."""
    complaints = error.errors()
    if isinstance(value.get("base"), dict):  # a new base: what is said of it as a text does not help
        complaints = [e for e in complaints if e["loc"][:2] != ("base", "str")] or complaints
    first = complaints[0]
    tags = set(METHODS) | set(OBJECTIVES) | {"str", "NewBase", "float", "int"}
    path = [str(part) for i, part in enumerate(first["loc"]) if not (i == 1 and str(part) in tags)]
    path = [p for i, p in enumerate(path) if not (i > 0 and p in ("str", "float", "list[str]", "NewBase"))]
    name = ".".join(path)
    hint = "docs/recipe.md lists every setting"
    if first["type"] == "extra_forbidden":
        message, hint = _unknown(path, value)
    elif first["type"] == "missing":
        message = f"'{name}' is missing"
    elif first["type"] == "union_tag_not_found":
        known = METHODS if path[0] == "method" else OBJECTIVES
        message = f"'{name}.kind' is missing; there are {', '.join(known)}"
        hint = f"write {name}: {next(iter(known))}, or {name}: {{kind: {next(iter(known))}, ...}}"
    elif first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"{name}: a section with settings of its own is expected here (found {SHORT.repr(first['input'])})"
    elif first["type"] == "union_tag_invalid":
        known = METHODS if path[0] == "method" else OBJECTIVES
        given = str(first.get("ctx", {}).get("tag", ""))
        message = f"{name}: there is no {path[0]} '{given}'; there are {', '.join(known)}"
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else hint
    elif first["type"] == "value_error":
        text = first["msg"].removeprefix("Value error, ")
        message = f"{name}: {text}" if name and not text.startswith(name) else text
    else:
        found = f" (found {SHORT.repr(first['input'])})"
        message = f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}{found}"
    more = error.error_count() - 1
    if more:
        hint += f" ({more} more complaint{'s' if more > 1 else ''} after this)"
    return RecipeError(message, file=file, line=_line(node, path), hint=hint)


def _unknown(path: list[str], value: Any) -> tuple[str, str]:
    """An unknown key: the nearest valid one, or the method or objective it belongs to."""
    *parents, key = path
    models: dict[str, type[BaseModel]] = {
        "data": DataSettings, "train": TrainSettings, "evaluate": EvaluateSettings, "plan": PlanSettings,
        "data.select": SelectSettings, "data.look_up": LookUpSettings,
    }  # fmt: skip
    model: type[BaseModel] = Recipe
    if parents:
        section = parents[0]
        registries: dict[str, Mapping[str, type[BaseModel]]] = {"method": METHODS, "objective": OBJECTIVES}
        kinds = registries.get(section)
        if kinds is not None:
            given = value[section] if isinstance(value[section], str) else value[section].get("kind")
            model = kinds[given]
            idle = {k: m.idle for k, m in OBJECTIVES.items()}
            owners = [k for k, m in kinds.items() if key in m.model_fields and key not in idle.get(k, ())]
            if owners:
                return (
                    f"'{'.'.join(path)}' belongs to {section} {', '.join(owners)} and has no effect on {given}",
                    f"leave it out, or use {section}: {{kind: {owners[0]}}}",
                )
        else:
            model = models.get(".".join(parents), models.get(section, NewBase))
    names = list(model.model_fields)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    elsewhere = [s for s, m in models.items() if key in m.model_fields]
    where = ".".join(parents) or "the recipe"
    if elsewhere:
        hint = f"'{key}' belongs into the section '{elsewhere[0]}'"
    elif near:
        hint = f"did you mean '{'.'.join([*parents, near[0]])}'?"
    else:
        hint = f"{where} knows {', '.join(names)}"
    return f"there is no setting '{'.'.join(path)}'", hint


def _line(node: Any, path: list[str]) -> int | None:
    """The line of a key in the YAML file, or of its nearest parent."""
    line = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _resolved(recipe: Recipe, *, folder: Path) -> Recipe:
    """Relative paths made relative to the recipe's folder; hub names and absolute paths stay."""

    def path(name: str) -> str:
        there = os.path.join(folder, os.path.expanduser(name))
        is_path = os.path.exists(there) or name.startswith((".", "/", "~")) or name.count("/") != 1
        return os.path.normpath(there) if is_path else name

    data = recipe.data
    train = path(data.train) if isinstance(data.train, str) else [path(p) for p in data.train]
    update: dict[str, Any] = {"train": train, "benchmarks": [path(name) for name in data.benchmarks]}
    for key in ("validation", "test", "template", "replay", "protected", "names"):
        given = getattr(data, key)
        if isinstance(given, str):
            update[key] = path(given)
    if data.look_up is not None and data.look_up.documents is not None:
        update["look_up"] = data.look_up.model_copy(update={"documents": path(data.look_up.documents)})
    base: str | NewBase = recipe.base
    if isinstance(base, NewBase):
        base = base.model_copy(update={"config": path(base.config), "tokenizer": path(base.tokenizer)})
    elif base != "starter" and os.path.exists(os.path.join(folder, os.path.expanduser(base))):
        base = path(base)
    objective = recipe.objective
    if objective.teacher_base == BASE and isinstance(base, str):
        objective = objective.model_copy(update={"teacher": base})
    elif objective.teacher_base is not None and os.path.exists(
        os.path.join(folder, os.path.expanduser(objective.teacher_base))
    ):
        objective = objective.model_copy(update={"teacher": path(objective.teacher_base)})
    named = {key: getattr(recipe.evaluate, key) for key in ("general", "documents", "embedder", "json_schema", "swaps")}
    asked: dict[str, Any] = {key: path(name) for key, name in named.items() if name is not None}
    if (judge := recipe.evaluate.judge) is not None and judge.labels is not None:
        asked["judge"] = judge.model_copy(update={"labels": path(judge.labels)})
    if recipe.evaluate.groups is not None and recipe.evaluate.groups.words is not None:
        asked["groups"] = GroupSettings(words=path(recipe.evaluate.groups.words))
    evaluate = recipe.evaluate.model_copy(update=asked)
    sections = {"data": data.model_copy(update=update), "base": base, "objective": objective, "evaluate": evaluate}
    return recipe.model_copy(update=sections)
