"""A run with new tokens, from the recipe to the export: what is learned, kept, loaded, resumed and refused."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tunesmith import api, cli
from tunesmith.chat import answer
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import Interrupted, ModelError, RecipeError, StorageError, TunesmithError
from tunesmith.export import export_peft
from tunesmith.generate.sampling import Sampling
from tunesmith.methods import METHODS
from tunesmith.methods.lora import Lora
from tunesmith.models.extended import ExtendedHead, extend_tables, new_rows
from tunesmith.models.load import Model, load_model
from tunesmith.objectives.causal import Causal
from tunesmith.recipe import load_recipe
from tunesmith.registry.workspace import Workspace
from tunesmith.runs import prepare_data
from tunesmith.texts import train_text
from tunesmith.train.observers import Silent
from tunesmith.vocabulary import grow_tokenizer

NUM_NEW = 12
RECIPE = f"""\
name: toy
base: base
data: {{train: rows.jsonl, validation: 0.25}}
objective: {{kind: causal, new_tokens: {NUM_NEW}}}
method: {{kind: lora, rank: 4}}
train: {{max_steps: 4, batch_rows: 8, learning_rate: 2e-2, validate_every: 2, checkpoint_every: 2}}
evaluate: {{against: [base]}}
"""
WORDS = ("Brücke", "Mühle", "Bäckerei", "Häuser", "Frühling", "Vögel")


@pytest.fixture(scope="session")
def grown_project(build_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of bytes, German sentences and a recipe."""
    folder = tmp_path_factory.mktemp("grown")
    build_model("llama", dtype=torch.float32, max_position_embeddings=256).save(folder / "base")
    rows = [{"text": f"Die {a} und die {b} stehen an Tag {n} früh auf."} for n, a in enumerate(WORDS) for b in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def grown_run(grown_project: Path) -> api.Run:
    """A finished run that no test changes."""
    return tune(grown_project)


@pytest.fixture
def project(grown_project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown_project, tmp_path / "project", ignore=shutil.ignore_patterns("w")))


def tune(project: Path, *overrides: str, **given: Any) -> api.Run:
    return api.tune(project / "toy.yaml", workspace=Workspace(project / "w"), overrides=list(overrides), **given)


def adapter(run: api.Run) -> bytes:
    return (run.path / "model" / "adapter_model.safetensors").read_bytes()


def test_the_run_says_what_was_learned_and_what_it_gains(grown_project: Path, grown_run: api.Run) -> None:
    document = json.loads((grown_run.path / "vocabulary.json").read_text())
    assert (document["new_tokens"], document["first_id"], document["tokens"]) == (NUM_NEW, 262, 262 + NUM_NEW)
    assert document["measured_on"] == "validation"
    assert document["before"]["words"] == document["after"]["words"]
    assert document["before"]["bytes_per_token"] == 1.0  # a base of bytes
    assert document["after"]["tokens_per_word"] < 0.8 * document["before"]["tokens_per_word"]
    assert grown_run.summary["vocabulary"] == document
    line = next(line for line in train_text(grown_run.summary).splitlines() if "new tokens" in line)
    assert "tokens a word" in line
    assert "validation rows" in line
    base = Tokenizer.from_folder(grown_project / "base")
    held = [e.text for e in prepare_of(grown_project).examples("validation")]
    assert document["before"]["tokens"] == sum(map(len, base.encode_text(held)))
    kept = Tokenizer.from_folder(grown_run.path / "model")
    assert document["after"]["tokens"] == sum(map(len, kept.encode_text(held)))
    assert grown_run.resolved["hashes"]["tokenizer"] == kept.digest


def prepare_of(project: Path, *overrides: str) -> Any:
    recipe = load_recipe(project / "toy.yaml", overrides=list(overrides))
    model = load_model(recipe.base)
    grow_tokenizer(recipe, model=model, workspace=Workspace(project / "w"))
    return prepare_data(recipe, model=model, workspace=Workspace(project / "w"))


def test_the_prepared_rows_are_those_of_the_larger_tokenizer(grown_project: Path) -> None:
    larger, plain = prepare_of(grown_project), prepare_of(grown_project, "objective.new_tokens=0")
    assert larger.digest != plain.digest
    assert larger.train.num_tokens < plain.train.num_tokens
    assert larger.ledger == plain.ledger
    assert prepare_of(grown_project).digest == larger.digest
    assert prepare_of(grown_project, "objective.new_tokens=13").digest != larger.digest
    assert prepare_of(grown_project, "objective.new_tokens=null").train.num_tokens == plain.train.num_tokens


def test_nothing_is_learned_from_rows_that_are_held_out(project: Path) -> None:
    held = [{"text": "xyzzy " * 30}] * 2
    (project / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    recipe = load_recipe(project / "toy.yaml", overrides=[f"data.validation={project / 'held.jsonl'}"])
    model = load_model(recipe.base)
    before = model.tokenizer.backend.get_vocab()
    assert grow_tokenizer(recipe, model=model, workspace=Workspace(project / "w")) is not None
    learned = set(model.tokenizer.backend.get_vocab()) - set(before)
    assert len(learned) == NUM_NEW
    assert not any("x" in text or "z" in text for text in learned)


def test_the_file_holds_the_new_rows_and_no_table(grown_run: api.Run) -> None:
    tensors = load_file(str(grown_run.path / "model" / "adapter_model.safetensors"))
    rows = {name: t for name, t in tensors.items() if "token_adapter" in name}
    assert {name.split(".")[-3] for name in rows} == {"embed_tokens", "lm_head"}
    assert all(t.shape == (NUM_NEW, 32) for t in rows.values())
    config = json.loads((grown_run.path / "model" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"]["lm_head"] == list(range(262, 262 + NUM_NEW))


def test_loaded_it_reads_and_writes_the_new_tokens(grown_project: Path, grown_run: api.Run) -> None:
    tuned = api.load(grown_run)
    assert tuned.model.tokenizer.num_tokens == 262 + NUM_NEW
    assert isinstance(tuned.model.head, ExtendedHead)
    saved = load_file(str(grown_run.path / "model" / "adapter_model.safetensors"))
    for name, row in new_rows(tuned.model).items():
        assert torch.equal(row, saved[f"base_model.model.{name}"])
    limit = Sampling(max_tokens=5)
    assert tuned.generate("Die Brücke", sampling=limit) == tuned.generate("Die Brücke", sampling=limit)


def test_base_and_tuned_are_compared_by_the_byte_each_with_its_own_tokens(
    grown_project: Path, grown_run: api.Run
) -> None:
    document = api.evaluate(grown_run, workspace=Workspace(grown_project / "w")).document
    assert list(document["metrics"]) == ["bits_per_byte"]
    plain = tune(grown_project, "objective=causal", "name=plain")
    expected = api.evaluate(plain, workspace=Workspace(grown_project / "w")).document
    found = [d["metrics"]["bits_per_byte"]["systems"]["base"] for d in (document, expected)]
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stopped_run_goes_on_to_the_same_bits(project: Path, method: str, step: int) -> None:
    class Stopping(Silent):
        def step(self, record: dict[str, Any]) -> None:
            if record["step"] == step:
                signal.raise_signal(signal.SIGTERM)

    whole = tune(project, f"method={method}")
    with pytest.raises(Interrupted):
        tune(project, f"method={method}", observer=Stopping())
    shutil.rmtree(project / "w" / "cache")  # what was learned is learned again
    resumed = tune(project, f"method={method}", resume=True)
    for path in (whole.path / "model").iterdir():
        assert path.read_bytes() == (resumed.path / "model" / path.name).read_bytes(), path.name
    with pytest.raises(Interrupted):
        tune(project, f"method={method}", observer=Stopping())
    with pytest.raises(RecipeError, match=r"recipe\.objective"):
        tune(project, f"method={method}", "objective.new_tokens=11", resume=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "full", "{kind: layers, last: 1, head: true}", "ia3", "bitfit", "vera"])
def test_merged_it_is_a_plain_model_with_the_larger_tokenizer(
    build_model: Callable[..., Model], project: Path, method: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(project / "base")
    build_model("qwen2", dtype=torch.float32, tie_word_embeddings=tied).save(project / "base")
    run = tune(project, f"method={method}", "data.max_tokens=64")
    out = api.export(run, form="merged", out=project / "out", workspace=Workspace(project / "w"))
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert theirs.get_input_embeddings().weight.shape == theirs.lm_head.weight.shape == (262 + NUM_NEW, 32)
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == tied
    tuned = api.load(run)
    (ids,) = tuned.model.tokenizer.encode_text(["Die Brücke"])
    assert max(ids) >= 262
    assert tokenizer("Die Brücke", add_special_tokens=False).input_ids == ids
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([ids])).logits[0]
        ours = tuned.model.head(_hidden(tuned.model, ids))
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-4)


def _hidden(model: Model, ids: list[int]) -> torch.Tensor:
    import numpy as np

    from tunesmith.data.pack import build_pack
    from tunesmith.data.types import Sequence

    return model.hidden(
        model.attention(build_pack([Sequence(np.array(ids, np.int32), np.zeros(len(ids), np.float32))]))
    )


KNOBS = {"adapters": {"reduction": 4}, "layers": {"last": 1}, "vera": {"rank": 8}} | {
    name: {"num_tokens": 3} for name in ("prompt", "prefix", "p_tuning")
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_new_tokens(build_model: Callable[..., Model], project: Path, method: str) -> None:
    shutil.rmtree(project / "base")
    build_model("qwen2", dtype=torch.float32).save(project / "base")
    run = tune(
        project,
        f"method={json.dumps({'kind': method} | KNOBS.get(method, {}))}",
        "train.precision=bf16",
        "train.gradient_checkpointing=true",
        "data.max_tokens=64",
    )
    if method != "full":
        assert any("token_adapter" in name for name in load_file(str(run.path / "model" / "adapter_model.safetensors")))
    evaluation = api.evaluate(run, workspace=Workspace(project / "w"))
    assert evaluation.value("bits_per_byte") < evaluation.value("bits_per_byte", system="base")


def test_biases_of_new_tokens_are_not_left_behind(
    build_model: Callable[..., Model], toy_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, method = build_model("llama", dtype=torch.float32), Lora(rank=2)
    model.causal.lm_head = torch.nn.Linear(32, 264)
    extend_tables(model, first=262, num_new=2)
    method.apply(model, seed=0)
    template = ChatTemplate(toy_tokenizer)
    with pytest.raises(RecipeError, match="biases") as error:
        export_peft(
            model,
            method=method,
            template=template,
            contract={"probes": []},
            objective=Causal(),
            head={},
            out=tmp_path / "out",
        )
    assert "merged" in error.value.hint
    method.save(model, folder=tmp_path)
    assert load_file(str(tmp_path / "adapter_model.safetensors"))[
        "base_model.model.lm_head.token_adapter.biases"
    ].shape == (2,)


@pytest.mark.parametrize("method", ["lora", "adapters", "prompt", "prefix", "p_tuning"])
def test_what_peft_cannot_hold_is_refused_by_name(project: Path, method: str) -> None:
    run = tune(project, f"method={json.dumps({'kind': method} | KNOBS.get(method, {}))}", "train.max_steps=1")
    assert isinstance(api.load(run).generate("Die", sampling=Sampling(max_tokens=2)), str)
    out = project / "out"
    if method == "lora":
        api.export(run, form="peft", out=out, workspace=Workspace(project / "w"))
        assert Tokenizer.from_folder(out).num_tokens == 262 + NUM_NEW
        return
    with pytest.raises(RecipeError, match=method) as error:
        api.export(run, form="peft", out=out, workspace=Workspace(project / "w"))
    assert error.value.hint
    assert not out.exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_tokenizer_is_found(project: Path, method: str) -> None:
    run = tune(project, f"method={method}", "train.max_steps=1")
    path = run.path / "model" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"].pop()  # no probe of the token contract would notice
    path.write_text(json.dumps(document))
    with pytest.raises(StorageError, match="no longer the one") as error:
        api.load(run)
    assert error.value.hint


@pytest.mark.parametrize("damage", ["vocabulary.json", "model/tokenizer.json"])
def test_a_run_without_a_part_of_it_is_refused(project: Path, damage: str) -> None:
    run = tune(project, "train.max_steps=1")
    (run.path / damage).unlink()
    with pytest.raises(TunesmithError) as error:
        api.load(run)
    assert error.value.hint


def test_the_base_does_not_answer_in_tokens_that_it_does_not_know(grown_project: Path, grown_run: api.Run) -> None:
    with pytest.raises(RecipeError, match="does not know") as error:
        answer(
            grown_run.name, prompt="a", system=None, sampling={}, base=True, workspace=Workspace(grown_project / "w")
        )
    assert error.value.hint


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("objective.new_tokens=100000", RecipeError, "hold only"),
        ("objective.new_tokens=-1", RecipeError, "greater than or equal to 0"),
        ("objective.new_token=1", RecipeError, "new_token"),
        ("evaluate={metrics: [bits_per_byte, perplexity]}", RecipeError, "use bits_per_byte"),
        ("objective={kind: instruction, new_tokens: 5}", RecipeError, "belongs to objective causal"),
    ],
)
def test_what_makes_no_sense_is_refused(
    project: Path, override: str, error: type[TunesmithError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        tune(project, override)
    assert caught.value.hint
    assert not Workspace(project / "w").run_folders()


def test_a_tokenizer_of_another_kind_is_refused_before_anything_is_read(project: Path) -> None:
    path = project / "base" / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = [[token, -1.0] for token in document["model"]["vocab"]]
    document["model"] = {"type": "Unigram", "unk_id": None, "vocab": vocabulary, "byte_fallback": False}
    path.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="Unigram") as error:
        tune(project, "data.train=gone.jsonl")
    assert "new_tokens" in error.value.hint


def test_preparing_alone_says_what_the_tokens_gain(grown_project: Path) -> None:
    arguments = ["data", "prepare", str(grown_project / "toy.yaml"), "--workspace", str(grown_project / "w"), "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    document = json.loads(result.stdout)
    assert document["vocabulary"]["new_tokens"] == NUM_NEW
    assert document["train"]["tokens"] == prepare_of(grown_project).train.num_tokens
    assert "new tokens: " in CliRunner().invoke(cli.app, arguments[:-1]).stdout
