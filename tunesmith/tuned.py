"""A tuned model ready for use: loaded from its run, checked, and asked."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.answers import Answer
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import RecipeError
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import Method
from tunesmith.models.heads import load_head, read_head_document
from tunesmith.models.load import Model, load_model
from tunesmith.objectives.headed import Headed
from tunesmith.registry.workspace import Workspace
from tunesmith.runs import (
    Run,
    check_base,
    check_finished,
    device_named,
    find_run,
    template_of_run,
)
from tunesmith.train.readings import predict
from tunesmith.vocabulary import restore_vocabulary


@dataclass(frozen=True)
class Tuned:
    """A tuned model ready for use."""

    run: Run
    model: Model
    template: ChatTemplate
    method: Method
    head: dict[str, Any] = field(default_factory=dict)  # what its outputs, or the classes' names, mean

    def predict(self, texts: "list[str]") -> Answer:
        """What the run says of texts (their words are what spaces part). RecipeError where it only writes text.

        A run that was trained on conversations reads a text as the user's turn.
        """
        return self.predict_examples([self._asked(text, number=i) for i, text in enumerate(texts, start=1)])

    def _asked(self, text: str, *, number: int) -> Example:
        origin = Origin("text", number)
        if not self.head.get("conversations"):
            return Example(origin, "text", text=text, words=tuple(text.split()))
        return Example(origin, "chat", (*self._messages(text), Message("assistant", "")))

    def predict_examples(self, examples: list[Example]) -> Answer:
        """As `predict`, of rows in any form that can be trained on."""
        objective = self.run.recipe.objective
        if not isinstance(objective, Headed):
            raise RecipeError(
                f"objective '{objective.kind_name}' has no head to read", hint="use generate, or another run"
            )
        return predict(
            self.model,
            objective,
            examples,
            template=self.template,
            settings=self.run.recipe.train,
            calibration=self.head["calibration"],
        )

    def generate(
        self, prompt: "str | list[Message] | list[dict[str, Any]]", *, sampling: Sampling | None = None
    ) -> str:
        """The answer to a prompt or to a conversation that ends with a user turn."""
        return self.generate_many([prompt], sampling=sampling)[0]

    def generate_many(self, prompts: "list[Any]", *, sampling: Sampling | None = None) -> list[str]:
        """The answers to several prompts, together."""
        ids = [self.template.prompt(self._messages(p)).ids for p in prompts]
        return [c.text for c in self._generator().generate(ids, sampling=sampling or Sampling())]

    def stream(
        self, prompt: "str | list[Message] | list[dict[str, Any]]", *, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """The answer, piece by piece."""
        ids = self.template.prompt(self._messages(prompt)).ids
        return self._generator().stream(ids, sampling=sampling or Sampling())

    def _generator(self) -> Generator:
        if self.run.recipe.objective.num_outputs:
            raise RecipeError(
                f"{self.run.name} was tuned for {self.run.recipe.objective.kind_name} and writes no text",
                hint="tunesmith generate RUN TEXT shows what it says of a text; in Python, predict",
            )
        return Generator(self.model, stop_ids=self.template.stop_ids())

    def _messages(self, prompt: Any) -> list[Message]:
        if isinstance(prompt, str):
            system = self.run.recipe.data.system
            return [*([Message("system", system)] if system else []), Message("user", prompt)]
        return [m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in prompt]


def load(run: Run | Path | str, *, workspace: Workspace | None = None, device: str = "auto") -> Tuned:
    """Load a run's tuned model and check its token contract.

    Raises NotFoundError where the run has no model yet, TemplateError where the contract is broken.
    """
    run = find_run(run, workspace=workspace, finished=True)
    folder = run.path / "model"
    check_finished(run)
    where = device_named(device)
    method = run.recipe.method
    if method.saves_model:
        model = load_model(str(folder), device=where)
        restore_vocabulary(run, model=model, rows=False)
    else:
        model = load_model(run.recipe.base, device=where)
        check_base(run, model)
        restore_vocabulary(run, model=model, rows=True)
        method.load(model, folder=folder)
        model.causal.to(where)
        template_path = folder / "chat_template.jinja"
        if template_path.is_file():
            model.tokenizer.chat_template = template_path.read_text("utf-8")
    head = load_head(model, folder=folder) if run.recipe.objective.num_outputs else calibration_of(run)
    model.causal.eval()
    return Tuned(run, model, template_of_run(run, model=model), method, head)


def calibration_of(run: Run) -> dict[str, Any]:
    """What the words of a run without a head mean; nothing where they are no classes."""
    return read_head_document(run.path / "model") if isinstance(run.recipe.objective, Headed) else {}
