"""Which rows are shown, and which part of their prompts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.evaluate.examples import EXAMPLES_A_GROUP, Headline, common_start, compared, examples

SENTENCE = st.lists(st.sampled_from(["a", "red", "van", ",", "\n"]), max_size=9).map(" ".join)
HEADLINE = Headline("exact_match", "tuned", "base", True)


def row(number, *, prompt="hello", tuned=1.0, base=0.0):
    scores = {"tuned": {"exact_match": tuned}, "base": {"exact_match": base}}
    return {
        "row": number,
        "origin": f"t.jsonl:{number}",
        "prompt": prompt,
        "reference": "a b",
        "outputs": {"base": "x", "tuned": "a b"},
        "scores": scores,
    }


def examples_of(tmp_path, rows, *, headline=HEADLINE):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return examples(path, headline=headline)


def test_groups(tmp_path):
    rows = [row(i, tuned=float(i % 5 != 0), base=float(i % 7 == 0)) for i in range(200)]
    better, worse, sample = examples_of(tmp_path, rows)["groups"]
    by_origin = {r["origin"]: r["scores"] for r in rows}
    gains = [
        by_origin[r["origin"]]["tuned"]["exact_match"] - by_origin[r["origin"]]["base"]["exact_match"] for r in rows
    ]
    assert (better["title"], better["total"]) == ("better", sum(g > 0 for g in gains))
    assert (worse["title"], worse["total"]) == ("worse", sum(g < 0 for g in gains))
    assert sample["total"] == 200
    for group, sign in ((better, 1), (worse, -1)):
        assert len(group["rows"]) == min(EXAMPLES_A_GROUP, group["total"])
        for shown in group["rows"]:
            scores = by_origin[shown["origin"]]
            assert sign * (scores["tuned"]["exact_match"] - scores["base"]["exact_match"]) > 0
    shown = [int(r["origin"].split(":")[1]) for r in better["rows"]]
    assert max(shown) > 50  # chance decides among equals, not the place in the file


def test_largest_changes_come_first_and_lower_can_be_better(tmp_path):
    headline = Headline("perplexity", "tuned", "base", False)
    rows = [row(i) | {"scores": {"tuned": {"perplexity": 2.0}, "base": {"perplexity": float(i)}}} for i in range(40)]
    better, worse, _ = examples_of(tmp_path, rows, headline=headline)["groups"]
    assert [r["origin"] for r in better["rows"]] == [f"t.jsonl:{i}" for i in range(39, 29, -1)]
    assert [r["origin"] for r in worse["rows"]] == ["t.jsonl:0", "t.jsonl:1"]
    assert better["rows"][0]["outputs"][0]["right"] is None


def test_sample_is_not_the_first_rows(tmp_path):
    (sample,) = examples_of(tmp_path, [row(i) for i in range(500)], headline=None)["groups"]
    places = [int(r["origin"].split(":")[1]) for r in sample["rows"]]
    assert places == sorted(places)
    assert max(places) > 100
    assert len(set(places)) == EXAMPLES_A_GROUP


def test_no_rows(tmp_path):
    assert examples_of(tmp_path, []) is None
    assert examples(tmp_path / "missing.jsonl", headline=HEADLINE) is None


def test_rows_without_scores_are_neither_better_nor_worse(tmp_path):
    bare = {"row": 0, "prompt": "p", "reference": "r", "outputs": {"tuned": "r"}}
    better, worse, sample = examples_of(tmp_path, [bare])["groups"]
    assert (better["rows"], worse["rows"]) == ([], [])
    assert sample["rows"][0]["origin"] == "row 0"


def test_plain_texts_have_scores_and_no_answers(tmp_path):
    rows = [row(i, prompt=[]) | {"reference": f"Once upon {i} times.", "outputs": {}} for i in range(3)]
    shown = examples_of(tmp_path, rows)["groups"][0]["rows"]
    assert {example["title"] for example in shown} == {f"Once upon {i} times." for i in range(3)}
    assert [(o["system"], o["pieces"]) for o in shown[0]["outputs"]] == [("tuned", None), ("base", None)]


def test_only_what_differs_is_shown(tmp_path):
    rules, task = "Follow these rules. " * 40, "Classify the following ticket into one of the classes we agreed on: "
    end = " Answer with the name of the class alone, in lower case and without a full stop."
    rows = [
        row(
            i,
            prompt=[
                {"role": "system", "content": rules},
                {"role": "user", "content": f"{task}ticket {i} and {word}{end}"},
            ],
        )
        for i, word in enumerate(["apples", "pears", "plums"])
    ]
    found = examples_of(tmp_path, rows)
    assert [(part["role"], part["text"]) for part in found["shared"]] == [
        ("system", rules),
        ("user, beginning", task + "ticket "),
        ("user, end", end),
    ]
    (message,) = found["groups"][0]["rows"][0]["messages"]
    assert message["role"] == "user"
    assert message["text"] in ("0 and apples", "1 and pears", "2 and plums")
    assert (message["cut"], message["cut_end"]) == (True, True)


@given(
    st.lists(
        st.text(alphabet="ab \n", max_size=80).map(
            lambda t: "the same beginning of them all, which is long enough to cut " + t + " x" * 40
        ),
        min_size=2,
        max_size=6,
    )
)
def test_nothing_of_a_prompt_is_lost(tmp_path_factory, prompts):
    found = examples_of(tmp_path_factory.mktemp("e"), [row(i, prompt=p) for i, p in enumerate(prompts)])
    shared = {part["role"]: part["text"] for part in found["shared"]}
    for shown in found["groups"][2]["rows"]:
        (message,) = shown["messages"]
        start = shared["prompt, beginning"] if message["cut"] else ""
        end = shared["prompt, end"] if message["cut_end"] else ""
        assert start + message["text"] + end == prompts[int(shown["origin"].split(":")[1])]


def test_prompts_of_different_shapes(tmp_path):
    system = {"role": "system", "content": "s" * 100}
    rows = [
        row(0, prompt=[system, {"role": "user", "content": "one"}]),
        row(
            1,
            prompt=[
                system,
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": None},
                {"role": "user", "content": "three"},
            ],
        ),
        row(2, prompt="plain"),
        row(3, prompt=[]),
    ]
    found = examples_of(tmp_path, rows)
    assert found["shared"] == []
    assert [len(r["messages"]) for r in found["groups"][2]["rows"]] == [2, 4, 1, 0]


def test_several_references(tmp_path):
    found = examples_of(tmp_path, [row(0) | {"reference": ["one", "two"]}])
    assert found["groups"][0]["rows"][0]["reference"] == "one\nor\ntwo"


@given(SENTENCE | st.text(max_size=40), SENTENCE | st.text(max_size=40))
def test_compared_keeps_both_texts(text, reference):
    pieces = compared(text, reference=reference)
    assert "".join(piece for piece, kind in pieces if kind != "deleted") == text
    if len(pieces) > 1:
        assert "".join(piece for piece, kind in pieces if kind != "inserted") == reference


def test_compared_marks_what_differs():
    pieces = compared('{"desk": "pixel", "level": "red"}', reference='{"desk": "parcel", "level": "red"}')
    assert [piece for piece in pieces if piece[1] != "equal"] == [("parcel", "deleted"), ("pixel", "inserted")]
    assert compared("entirely unlike", reference='{"desk": 1}') == [("entirely unlike", "equal")]
    assert compared("the same ", reference="the same") == [("the same ", "equal")]


def test_words_that_were_changed_side_by_side_are_one_change():
    pieces = compared("we ship it on a red van today", reference="we ship it in the blue van")
    assert pieces == [
        ("we ship it ", "equal"), ("in the blue", "deleted"), ("on a red", "inserted"), (" van", "equal"),
        (" today", "inserted"),
    ]  # fmt: skip


@given(st.text(alphabet="ab", max_size=6), st.text(alphabet="ab", max_size=6))
def test_common_start(left, right):
    found = common_start(left, right)
    assert left.startswith(found)
    assert right.startswith(found)
    assert left[len(found) : len(found) + 1] != right[len(found) : len(found) + 1] or found == left == right


@pytest.mark.parametrize(
    ("evaluation", "metric", "pair"),
    [
        ({"metrics": {"a": {"higher_is_better": True, "differences": {"tuned - base": {}}}}}, "a", "tuned - base"),
        (
            {"primary": "b", "metrics": {"a": {}, "b": {"higher_is_better": False, "differences": {"x - y": {}}}}},
            "b",
            "x - y",
        ),
    ],
)
def test_headline(evaluation, metric, pair):
    headline = Headline.of(evaluation)
    assert (headline.metric, headline.pair) == (metric, pair)


@pytest.mark.parametrize(
    "evaluation", [None, {"metrics": {}}, {"metrics": {"a": {"higher_is_better": True, "differences": {}}}}]
)
def test_no_headline(evaluation):
    assert Headline.of(evaluation) is None
