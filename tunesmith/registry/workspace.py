"""The workspace: the folder `.tunesmith/` that holds a project's runs, its cache, its store and its index.

It is found upward from the current folder, as git finds `.git`; `--workspace` and `TUNESMITH_WORKSPACE` override that.
Nothing is created before the first write.
"""

import contextlib
import difflib
import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tunesmith.errors import NotFoundError, RecipeError, StorageError
from tunesmith.storage import new_folder, read_json, storage_errors, sweep, write_json, write_text

FOLDER = ".tunesmith"
VARIABLE = "TUNESMITH_WORKSPACE"
CURVES = "curves"  # the folder in a workspace of what `tunesmith curve` found, by the recipes' names
LATEST = "latest"

RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RUN_NAME = re.compile(rf"({RECIPE_NAME.pattern})-[0-9a-f]{{8}}")


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders of one project. Constructing it touches nothing on disk."""

    path: Path

    @property
    def runs(self) -> Path:
        """One folder a run."""
        return self.path / "runs"

    @property
    def cache(self) -> Path:
        """What can be computed again; may be deleted at any time."""
        return self.path / "cache"

    @property
    def store(self) -> Path:
        """The content-addressed files, see `registry.store`."""
        return self.path / "store"

    @property
    def index(self) -> Path:
        """The SQLite file, see `registry.index`."""
        return self.path / "index.sqlite"

    def create(self) -> None:
        """Make the folder if need be, with a `.gitignore` that keeps it out of git.

        A folder that holds anything but the workspace gets no `.gitignore`: it would hide the user's own files.
        Raises StorageError.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            sweep(self.path)
            own = {self.runs.name, self.cache.name, self.store.name}
            names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(self.index.name)}
            if names <= own:
                write_text(self.path / ".gitignore", text="*\n")

    def new_run(self, name: str) -> Path:
        """Make the folder of a new run of the recipe `name`: `runs/<name>-<8 hex digits>/`.

        It holds a `run.json` whose `state` is `started`, so a run that was killed never looks whole.
        Raises RecipeError for a name that is not a safe file name, StorageError if the folder cannot be written.
        """
        check_recipe_name(name)
        self.create()
        while (folder := self.runs / f"{name}-{secrets.token_hex(4)}").exists():
            pass
        with new_folder(folder) as new:
            write_json(
                new / "run.json",
                value={"run": folder.name, "name": name, "created": timestamp(), "state": "started"},
            )
        return folder

    def run_folders(self) -> list[Path]:
        """The folders of all runs, newest first."""
        if not self.runs.is_dir():
            return []
        folders = [f for f in self.runs.iterdir() if RUN_NAME.fullmatch(f.name) and _is_run(f)]
        return sorted(folders, key=lambda folder: (_created(folder), folder.name), reverse=True)

    def find_run(self, text: str) -> Path:
        """The folder of the run that `text` means.

        In this order: `latest`; a run's full name; a recipe's name (its newest run); a path to a run folder; the
        beginning of exactly one run's name. Raises NotFoundError with the candidates, or with the nearest names.
        """
        folders = self.run_folders()
        found = _meant(text, folders=folders)
        if len(found) == 1:
            return found[0]
        if found:
            raise NotFoundError(
                f"{text!r} is the beginning of {len(found)} runs: {_listed([folder.name for folder in found])}",
                hint="write more of the name of the run that is meant",
            )
        if not folders:
            raise NotFoundError(
                f"no run {text!r}: the workspace {self.path} holds no runs",
                hint=f"train one first, or name another workspace with --workspace or {VARIABLE}",
            )
        names = [folder.name for folder in folders]
        near = difflib.get_close_matches(text, names + sorted({recipe_name(name) for name in names}), n=3, cutoff=0.5)
        raise NotFoundError(
            f"no run {text!r} in {self.runs}; {'nearest' if near else 'it holds'}: {_listed(near or names)}",
            hint="give a run's name, its beginning, a recipe's name, `latest` or the path of a run folder",
        )


def find_workspace(explicit: Path | None = None) -> Workspace:
    """The workspace to use; it need not exist yet.

    `explicit` (the option `--workspace`) or else the variable `TUNESMITH_WORKSPACE` is the workspace folder itself, or
    a folder that holds one. Without either: the nearest `.tunesmith/` from the current folder upward, or else
    `.tunesmith/` in the current folder. Raises RecipeError if the named path is a file.
    """
    named = explicit if explicit is not None else os.environ.get(VARIABLE, "")
    if str(named):
        folder = Path(named).expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"the workspace {folder} is a file", hint="name a folder, which need not exist yet")
        return Workspace(folder / FOLDER if (folder / FOLDER).is_dir() else folder)
    current = Path.cwd()
    for folder in (current, *current.parents):
        if (folder / FOLDER).is_dir():
            return Workspace(folder / FOLDER)
    return Workspace(current / FOLDER)


def check_recipe_name(name: str) -> None:
    """Raise RecipeError unless `name` can be the first part of a run folder's name on every file system."""
    if not RECIPE_NAME.fullmatch(name) or name == LATEST:
        raise RecipeError(
            f"the recipe's name is {name!r}; allowed are 1 to 64 of the characters a-z A-Z 0-9 . _ - beginning with a "
            f"letter or a digit, and not {LATEST!r}",
            hint="choose another `name` in the recipe, such as support-triage",
        )


def recipe_name(run_name: str) -> str:
    """The recipe's part of a run's name: `support-triage` of `support-triage-0a1b2c3d`."""
    return run_name[: -len("-00000000")]


def timestamp() -> str:
    """This moment, ISO 8601 in UTC with microseconds, so that texts sort as times."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _meant(text: str, *, folders: list[Path]) -> list[Path]:
    """The folders that `text` may mean, by the first of `find_run`'s rules that holds; `folders` newest first."""
    if not text:
        return []
    if text == LATEST:
        return folders[:1]
    if exact := [folder for folder in folders if folder.name == text]:
        return exact
    if newest := [folder for folder in folders if recipe_name(folder.name) == text][:1]:
        return newest
    if _is_run(Path(text)):
        return [Path(text).resolve()]
    return [folder for folder in folders if folder.name.startswith(text)]


def _is_run(folder: Path) -> bool:
    return os.path.isfile(folder / "run.json")  # unlike Path.is_file, False for a text too long to be a path


def _created(folder: Path) -> float:
    """Seconds since 1970 from `run.json`; the folder's own time where that cannot be read."""
    with contextlib.suppress(StorageError, KeyError, TypeError, ValueError):
        return datetime.fromisoformat(read_json(folder / "run.json")["created"]).timestamp()
    return folder.stat().st_mtime


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
