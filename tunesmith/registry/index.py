"""The index: which datasets and bases were seen, and which runs came of them, in one SQLite file.

What a run is stands in its folder; the index copies it so that a hundred runs are listed and traced in one query. Data
and bases are known by the digest of their bytes (`registry.store.digest_of`), so lineage leads to exact bytes and can
say whether they are still there. Several processes may write at once (write-ahead log, a transaction a change).

Paths inside the workspace are kept relative to it, so that the workspace may be moved.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import JSON, URL, Connection, Engine, ForeignKey, NullPool, create_engine, event, select
from sqlalchemy.exc import DatabaseError, IntegrityError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from tunesmith.errors import NotFoundError, StorageError
from tunesmith.registry.store import Store, digest_of
from tunesmith.registry.workspace import recipe_name, timestamp
from tunesmith.storage import read_json, storage_errors

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
READ, WRITE = "BEGIN", "BEGIN IMMEDIATE"

State = Literal["started", "finished", "stopped", "failed"]


class Record(DeclarativeBase):
    """A row of a table. What `Index` returns is detached: a copy of the moment it was read."""

    type_annotation_map = {dict[str, Any]: JSON(none_as_null=True), list[str]: JSON}  # noqa: RUF012


class Dataset(Record):
    """Bytes that rows were read from."""

    __tablename__ = "datasets"
    digest: Mapped[str] = mapped_column(primary_key=True)
    files: Mapped[list[str]]  # where these bytes were seen last
    rows: Mapped[int]
    form: Mapped[str]
    created: Mapped[str]


class Base(Record):
    """A pre-trained model, as the bytes of its folder."""

    __tablename__ = "bases"
    digest: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    path: Mapped[str]
    model_type: Mapped[str]
    parameters: Mapped[int]
    created: Mapped[str]


class RunDataset(Record):
    """What a run used a dataset for: `train`, `validation` or `test`."""

    __tablename__ = "run_datasets"
    run: Mapped[str] = mapped_column(ForeignKey("runs.name"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("datasets.digest"))
    dataset: Mapped[Dataset] = relationship(lazy="joined")


class Run(Record):
    """One execution of a recipe. `summary` is its run.json, `evaluation` its evaluation.json."""

    __tablename__ = "runs"
    name: Mapped[str] = mapped_column(primary_key=True)
    recipe: Mapped[str]
    path: Mapped[str]
    created: Mapped[str]
    state: Mapped[str]
    recipe_digest: Mapped[str]
    resolved: Mapped[dict[str, Any]]
    base_digest: Mapped[str] = mapped_column(ForeignKey("bases.digest"))
    parent: Mapped[str | None] = mapped_column(ForeignKey("runs.name"))
    model_digest: Mapped[str | None]
    summary: Mapped[dict[str, Any] | None]
    evaluation: Mapped[dict[str, Any] | None]
    base: Mapped[Base] = relationship(lazy="joined")
    datasets: Mapped[list[RunDataset]] = relationship(
        lazy="selectin", cascade="all, delete-orphan", order_by=RunDataset.role
    )


@dataclass(frozen=True, slots=True)
class Node:
    """Bytes in a lineage. `state`: `verified`, `changed`, `missing`, `unfinished` (a run without a result) or
    `unchecked`."""

    kind: Literal["run", "base", "dataset"]
    name: str
    digest: str | None
    path: str
    state: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a run came of: its data by role, its base, and the run it went on from."""

    run: Node
    datasets: dict[str, Node]
    base: Node
    parent: "Lineage | None"

    @property
    def nodes(self) -> list[Node]:
        """All nodes, the run's own first, its furthest parent's last."""
        own = [self.run, *self.datasets.values(), self.base]
        return own + (self.parent.nodes if self.parent else [])

    @property
    def verified(self) -> bool:
        """Whether every byte that led to the run is still there."""
        return all(node.state == "verified" for node in self.nodes)

    def as_dict(self) -> dict[str, Any]:
        """Nested as the object is."""
        return asdict(self)


class Index:
    """The SQLite file at `path`; made on the first write. A newer schema is refused with a StorageError.

    `store`, where given, is a second place in which lineage looks for bytes.
    """

    def __init__(self, path: Path, *, store: Store | None = None):
        self.path = path
        self.store = store
        self._engine: Engine | None = None

    def record_dataset(self, files: Sequence[Path], *, rows: int, form: str) -> str:
        """Record the files or folders that rows were read from, in this order; returns their digest.

        One path: its `digest_of`. Several: SHA-256 of their digests, a line each, so names do not matter.
        Raises NotFoundError, StorageError.
        """
        digest = _digest_of_all(files)
        with self._session(write=True) as session:
            dataset = session.get(Dataset, digest) or Dataset(digest=digest, created=timestamp())
            dataset.files, dataset.rows, dataset.form = [self._stored(file) for file in files], rows, form
            session.add(dataset)
        return digest

    def record_base(
        self, path: Path, *, name: str, model_type: str, parameters: int, known: Mapping[str, str] | None = None
    ) -> str:
        """Record the folder (or file) of a pre-trained model; returns its digest. `known` is as in `digest_of`.

        Raises NotFoundError, StorageError.
        """
        digest = digest_of(path, known=known)
        with self._session(write=True) as session:
            base = session.get(Base, digest) or Base(digest=digest, created=timestamp())
            base.name, base.path, base.model_type, base.parameters = name, self._stored(path), model_type, parameters
            session.add(base)
        return digest

    def start_run(self, folder: Path, *, datasets: Mapping[str, str], base: str, parent: str | None = None) -> None:
        """Record that the run in `folder`, which holds `recipe.yaml` and `resolved.json`, has begun or was resumed.

        `datasets` maps `train`, `validation`, `test` to recorded digests, `base` is one; `parent` is the name of the
        run this one goes on from. Raises NotFoundError if one of these is not recorded, StorageError.
        """
        needed: list[tuple[type[Record], str]] = [(Base, base), *((Dataset, digest) for digest in datasets.values())]
        if parent is not None:
            needed.append((Run, parent))
        recipe_digest, resolved = digest_of(folder / "recipe.yaml"), read_json(folder / "resolved.json")
        name = folder.name
        with self._session(write=True) as session:
            for table, key in needed:
                if session.get(table, key) is None:
                    hint = "record datasets, base and parent run before the run itself"
                    raise NotFoundError(f"{key} is not among the recorded {table.__tablename__}", hint=hint)
            run = session.get(Run, name) or Run(name=name, recipe=recipe_name(name), created=timestamp())
            run.path, run.state, run.base_digest, run.parent = self._stored(folder), "started", base, parent
            run.recipe_digest, run.resolved = recipe_digest, resolved
            run.datasets = [RunDataset(run=name, role=role, digest=digest) for role, digest in datasets.items()]
            session.add(run)

    def finish_run(self, name: str, *, state: State, summary: dict[str, Any] | None = None) -> None:
        """Record how a run ended, with its `summary` and the bytes of the `model/` (if any) in its folder.

        The summary is that of `run.json` unless given, by who will write it there. Raises NotFoundError, StorageError.
        """
        folder = self.located(self.run(name).path)
        summary = read_json(folder / "run.json") if summary is None else summary
        model_digest = digest_of(folder / "model") if (folder / "model").is_dir() else None
        with self._session(write=True) as session:
            run = session.get_one(Run, name)
            run.state, run.summary, run.model_digest = state, summary, model_digest

    def record_evaluation(self, name: str) -> None:
        """Record the `evaluation.json` in a run's folder. Raises NotFoundError, StorageError."""
        evaluation = read_json(self.located(self.run(name).path) / "evaluation.json")
        with self._session(write=True) as session:
            session.get_one(Run, name).evaluation = evaluation

    def runs(self) -> list[Run]:
        """All runs, newest first."""
        if not self.path.exists():
            return []
        with self._session(write=False) as session:
            return list(session.scalars(select(Run).order_by(Run.created.desc(), Run.name)))

    def run(self, name: str) -> Run:
        """One run by its full name. Raises NotFoundError."""
        if self.path.exists():
            with self._session(write=False) as session:
                if (run := session.get(Run, name)) is not None:
                    return run
        raise NotFoundError(
            f"the index {self.path} knows no run {name!r}", hint="`tunesmith runs` lists those it knows"
        )

    def located(self, path: str) -> Path:
        """The absolute path of a recorded one (`Run.path`, `Base.path`, `Dataset.files`)."""
        return self.path.parent / path

    def lineage(self, name: str, *, verify: bool = True) -> Lineage:
        """What the run `name` came of. `verify` reads all bytes again, which takes a second or two a gigabyte.

        Raises NotFoundError.
        """
        run = self.run(name)
        model = str(Path(run.path) / "model")
        return Lineage(
            run=self._node("run", name, digest=run.model_digest, paths=[model], verify=verify),
            datasets={
                used.role: self._node(
                    "dataset",
                    ", ".join(Path(file).name for file in used.dataset.files),
                    digest=used.digest,
                    paths=used.dataset.files,
                    verify=verify,
                )
                for used in run.datasets
            },
            base=self._node("base", run.base.name, digest=run.base_digest, paths=[run.base.path], verify=verify),
            parent=self.lineage(run.parent, verify=verify) if run.parent else None,
        )

    def _node(
        self, kind: Literal["run", "base", "dataset"], name: str, *, digest: str | None, paths: list[str], verify: bool
    ) -> Node:
        located = [self.located(path) for path in paths]
        state = self._state(digest, paths=located) if verify else "unchecked"
        return Node(kind=kind, name=name, digest=digest, path=", ".join(map(str, located)), state=state)

    def _state(self, digest: str | None, *, paths: list[Path]) -> str:
        """Whether the bytes are where they were recorded, or in the store."""
        if digest is None:
            return "unfinished"
        if self.store is not None:
            with contextlib.suppress(NotFoundError, StorageError):
                self.store.verify(digest)
                return "verified"
        try:
            return "verified" if _digest_of_all(paths) == digest else "changed"
        except (NotFoundError, StorageError):
            return "missing"

    def _stored(self, path: Path) -> str:
        """`path` as it is recorded: relative to the workspace if it is inside, otherwise absolute."""
        absolute, workspace = Path(os.path.abspath(path)), Path(os.path.abspath(self.path.parent))
        return str(absolute.relative_to(workspace) if absolute.is_relative_to(workspace) else absolute)

    @contextlib.contextmanager
    def _session(self, *, write: bool) -> Iterator[Session]:
        """One transaction. One that writes takes the lock first, so that what it reads still holds when it writes."""
        with self._storage_errors():
            if self._engine is None:
                self._engine = self._opened()
            engine = self._engine.execution_options(begin=WRITE if write else READ)
            with Session(engine, expire_on_commit=False) as session, session.begin():
                yield session

    def _opened(self) -> Engine:
        """Open the file, and make its tables if it is new."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # A connection a transaction: nothing stays open, and nothing is shared by a forked process.
        engine = create_engine(
            URL.create("sqlite", database=str(self.path)), connect_args={"timeout": BUSY_SECONDS}, poolclass=NullPool
        )
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        with engine.connect() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"the index has schema {version}; this version of tunesmith knows up to {SCHEMA_VERSION}",
                file=self.path,
                hint="upgrade tunesmith, or choose another workspace with --workspace",
            )
        if version == 0:
            with engine.execution_options(begin=WRITE).begin() as connection:
                Record.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return engine

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, ProgrammingError):
            raise  # our own bug, not the disk's
        except DatabaseError as error:
            problem = str(error.orig)
            if "locked" in problem:
                hint = "another process is writing: run the same command again"
            elif "full" in problem:
                hint = "free some space on that disk, then run the same command again"
            elif "malformed" in problem or "not a database" in problem:
                hint = "move that file away: a new one is begun, and the run folders still hold all results"
            else:
                hint = "check the disk and the permissions of that folder, or choose another with --workspace"
            raise StorageError(f"the index cannot be used: {problem}", file=self.path, hint=hint) from error


def _digest_of_all(paths: Sequence[Path]) -> str:
    """One path: its digest. Several: SHA-256 of their digests, a line each."""
    digests = [digest_of(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _configure(connection: Any, _: Any) -> None:
    """Write-ahead log; transactions begin where `_begin` says and not where the driver would."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", READ))
