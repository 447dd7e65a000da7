"""What rows mean: every form, every refusal, mappings, tools and weights."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.formats import detect_form, examine, preference_defect, to_example
from tunesmith.data.ledger import Problem
from tunesmith.data.settings import DataSettings
from tunesmith.data.sources import read_rows
from tunesmith.data.types import Origin, Row
from tunesmith.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def example(value, **fields):
    return to_example(Row(Origin("rows.jsonl", 7), value), settings=DataSettings(train="rows.jsonl", **fields))


def turns(found):
    return [(message.role, message.content) for message in found.messages]


def chat(*messages):
    return {"messages": list(messages)}


ASKED = [("user", "hi"), ("assistant", "hello")]
FORMS = [
    (chat(USER, ASSISTANT), "chat", ASKED),
    (chat({"role": "developer", "content": "Be brief."}, USER, ASSISTANT), "chat", [("system", "Be brief."), *ASKED]),
    ({"prompt": "hi", "completion": "hello"}, "prompt_completion", ASKED),
    ({"prompt": "hi", "response": "hello"}, "prompt_completion", ASKED),
    ({"input": "hi", "output": "hello"}, "prompt_completion", ASKED),
    ({"question": "hi", "answer": "hello"}, "prompt_completion", ASKED),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "chat", ASKED),
    ({"prompt": [USER], "completion": "hello"}, "chat", ASKED),
    ({"instruction": "hi", "output": "hello"}, "alpaca", ASKED),
    ({"instruction": "hi", "input": " ", "response": "hello"}, "alpaca", ASKED),
    ({"instruction": "add", "input": "1 2", "output": "3"}, "alpaca", [("user", "add\n\n1 2"), ("assistant", "3")]),
    (
        {"instruction": "c", "input": None, "output": "d", "history": [["a", "b"]]},
        "alpaca",
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        "sharegpt",
        ASKED,
    ),
    ({"conversations": [USER, ASSISTANT], "system": "Be brief."}, "sharegpt", [("system", "Be brief."), *ASKED]),
    ({"messages": None, "prompt": "hi", "completion": "hello"}, "prompt_completion", ASKED),
]


@pytest.mark.parametrize(("value", "form", "expected"), FORMS)
def test_forms(value, form, expected):
    found = example(value)
    assert (found.form, turns(found), found.text) == (form, expected, None)
    assert found.origin == Origin("rows.jsonl", 7)


def test_plain_text():
    found = example({"text": "Once upon a time", "source": "book"})
    assert (found.form, found.text, found.messages) == ("text", "Once upon a time", ())
    assert found.columns == {"source": "book"}


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ({"text": "a", "label": "b"}, "labelled"),
        ({"text": "a", "intent": None}, "labelled"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "preference"),
        ({"sentence": "a"}, "unknown"),
        ({"text": "a", "code": "b"}, "unknown"),
        ({"text": "a", "url": "b", "label": "c"}, "labelled"),
        ({"text": "a", "url": "b", "title": "c"}, "text"),
        ({}, "unknown"),
        (["a"], "unknown"),
        ({"messages": None}, "chat"),
        ({"text": None, "label": "b"}, "unknown"),
        ({"tokens": ["a"], "tags": ["b"]}, "tagged"),
        ({"tokens": 12, "text": "a"}, "unknown"),
    ],
)
def test_detected_forms_that_need_more(value, form):
    assert detect_form(value) == form


def test_columns_that_are_not_read_are_kept():
    assert example({"prompt": "a", "completion": "b", "id": 3, "tag": None}).columns == {"id": 3, "tag": None}


REFUSED = [
    (chat(), "bad_row", "'messages' is empty"),
    ({"messages": None}, "bad_row", "'messages' is null"),
    ({"messages": "hi"}, "bad_row", "'messages' is a text"),
    (chat(USER, ASSISTANT, None), "bad_row", "message 3 is null"),
    (chat(USER), "bad_row", "ends with a user message"),
    (chat(USER, ASSISTANT, USER), "bad_row", "ends with a user message"),
    (chat(ASSISTANT, USER, ASSISTANT), "bad_row", "message 1 (assistant) opens"),
    (chat(USER, USER, ASSISTANT), "bad_row", "messages 1 and 2 are both user"),
    (chat(USER, ASSISTANT, ASSISTANT), "bad_row", "messages 2 and 3 are both assistant"),
    (chat(USER, {"role": "system", "content": "x"}, ASSISTANT), "bad_row", "message 2 is a system message"),
    (chat({"role": "system", "content": "x"}, ASSISTANT), "bad_row", "message 2 (assistant) opens"),
    (chat(USER, {"role": "tool", "content": "x"}, ASSISTANT), "bad_row", "(tool) follows the user"),
    (chat(USER, {"role": "robot", "content": "x"}), "bad_row", "'robot'; allowed are system, developer"),
    (chat(USER, {"role": 3, "content": "x"}), "bad_row", "the role a number"),
    (chat(USER, {"role": ["user"], "content": "x"}), "bad_row", "the role a list"),
    (chat({"role": "user", "content": None}, ASSISTANT), "bad_row", "message 1 (user) has no content"),
    (chat({"role": "user", "content": " \n"}, ASSISTANT), "bad_row", "user turn (message 1) is empty"),
    (chat(USER, {"role": "assistant", "content": 120}), "bad_row", "content of message 2 is a number"),
    (chat(USER, {"role": "assistant", "content": {"text": "x"}}), "bad_row", "is an object"),
    (chat(USER, {"role": "assistant", "content": [["x"]]}), "bad_row", "a list among its parts"),
    (chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), "bad_row", "type 'image_url'"),
    (chat({"role": "user", "content": [{"type": "text", "text": 1}]}, ASSISTANT), "bad_row", "'text' is a number"),
    (chat(USER, ASSISTANT | {"weight": 0.5}), "bad_row", "weight 0.5; allowed are 0"),
    (chat(USER, ASSISTANT | {"weight": True}), "bad_row", "weight True"),
    (chat(USER | {"weight": 1}, ASSISTANT), "bad_row", "only assistant turns are trained"),
    (chat(USER | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, ASSISTANT), "bad_row", "only the"),
    (chat(USER, {"role": "assistant", "tool_calls": [{}]}), "bad_row", "no function with a name"),
    (chat(USER, {"role": "assistant", "tool_calls": "f"}), "bad_row", "must be a list"),
    (chat(USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}), "bad_row", "not JSON"),
    (chat(USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "[]"}}), "bad_row", "a list"),
    (chat(USER, ASSISTANT) | {"tools": [1]}, "bad_row", "'tools' must be a list"),
    (chat(USER, ASSISTANT) | {"tools": "{"}, "bad_row", "'tools' is a text that is not JSON"),
    (chat({"role": "system", "content": "a"}, USER, ASSISTANT) | {"system": "b"}, "bad_row", "two system prompts"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "bad_row", "from 'alien'; allowed are"),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "bad_row", "pairs"),
    ({"prompt": 3, "completion": "b"}, "bad_row", "'prompt' is a number"),
    ({"prompt": " ", "completion": "b"}, "bad_row", "is empty"),
    ({"text": 3}, "bad_row", "'text' is a number"),
    ({"sentence": "a", "rating": 3}, "bad_row", "'sentence', 'rating' are no form"),
    ({}, "bad_row", "columns none"),
    (["user", "hi"], "bad_row", "the row is a list"),
    ({"text": "a", "label": {"b": 1}}, "bad_row", "'label' is an object; a label is a text, a number or a list"),
    ({"text": "a", "label": [["b"]]}, "bad_row", "'label' is a list; a label is a text, a number or a list"),
    ({"text": 3, "label": "b"}, "bad_row", "'text' is a number"),
    ({"words": ["a", "b"], "tags": ["x"]}, "bad_row", "2 words and 1 tags; there must be a tag for each word"),
    ({"words": ["a"], "tags": "x"}, "bad_row", "'tags' is a text; it must be a list of texts"),
    ({"tokens": ["a", None], "ner_tags": ["x", "y"]}, "bad_row", "'tokens' is a list; it must be a list of texts"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "bad_row", "preference"),
    (chat(USER, {"role": "assistant", "content": None}), "empty_target", "message 2 (assistant) has no content"),
    (chat(USER, {"role": "assistant"}), "empty_target", "message 2 (assistant) has no content"),
    (chat(USER, {"role": "assistant", "content": "\n "}), "empty_target", "answer (message 2) is empty"),
    (chat(USER, ASSISTANT | {"weight": 0}), "empty_target", "all assistant turns have the weight 0"),
    ({"prompt": "a", "completion": None}, "empty_target", "'completion' is null"),
    ({"prompt": "a", "completion": ""}, "empty_target", "is empty"),
    ({"instruction": "a", "output": ""}, "empty_target", "is empty"),
    ({"text": " \n"}, "empty_target", "the text is empty"),
    ({"text": " \n", "label": "b"}, "empty_target", "the text is empty"),
    ({"text": "a", "label": None}, "empty_target", "'label' is empty: nothing to learn"),
    ({"text": "a", "intent": " "}, "empty_target", "'intent' is empty: nothing to learn"),
    ({"words": [], "tags": []}, "empty_target", "'words' is empty"),
]


@pytest.mark.parametrize(("value", "kind", "words"), REFUSED)
def test_refused_rows(value, kind, words):
    problem = examine(Row(Origin("rows.jsonl", 7), value), settings=DataSettings(train="rows.jsonl"))
    assert isinstance(problem, Problem)
    assert (problem.kind, problem.severity, problem.line) == (kind, "error", 7)
    assert words in problem.message
    with pytest.raises(DataError) as caught:
        example(value)
    assert str(caught.value) == f"rows.jsonl:7: {problem.message}"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ({"text": "Where is it?", "label": "tracking"}, "tracking"),
        ({"text": "Where is it?", "topic": ["tracking", "late"]}, ("tracking", "late")),
        ({"text": "Where is it?", "labels": [0, 2]}, ("0", "2")),
        ({"text": "Where is it?", "labels": []}, ()),
        ({"text": "Where is it?", "target": 3}, "3"),
        ({"text": "Where is it?", "target": 2.5}, "2.5"),
        ({"text": "Where is it?", "target": "2.5"}, "2.5"),
    ],
)
def test_a_text_with_a_label(value, label):
    found = example(value | {"id": 7})
    assert (found.form, found.text, found.label, found.messages) == ("labelled", "Where is it?", label, ())
    assert found.columns == {"id": 7}


def test_a_label_may_be_an_answer_in_words():
    mapping = {"prompt": "text", "completion": "label"}
    found = example({"text": "Where is it?", "label": "tracking"}, mapping=mapping)
    assert turns(found) == [("user", "Where is it?"), ("assistant", "tracking")]
    assert found.label is None


def test_words_with_tags():
    for words, tags in (("words", "tags"), ("tokens", "ner_tags"), ("tokens", "labels")):
        found = example({words: ["Oslo", "is"], tags: ["B-PLACE", 0], "id": 7})
        assert (found.form, found.words, found.label) == ("tagged", ("Oslo", "is"), ("B-PLACE", "0"))
        assert (found.text, found.messages, found.columns) == (None, (), {"id": 7})


def test_labels_and_tags_may_stand_in_columns_of_their_own():
    value = {"title": "Late", "body": "again", "queue": "shipping", "hours": 2}
    found = example(value, mapping={"text": "{title}: {body}", "label": "queue"})
    assert (found.form, found.text, found.label, found.columns) == ("labelled", "Late: again", "shipping", {"hours": 2})
    assert example(value, mapping={"text": "body", "label": "hours"}).label == "2"
    assert example(value, mapping={"text": "body", "label": "{queue}/{hours}"}).label == "shipping/2"
    found = example({"w": ["a"], "t": ["b"]}, mapping={"words": "w", "tags": "t"})
    assert (found.form, found.words, found.label) == ("tagged", ("a",), ("b",))
    with pytest.raises(DataError, match="no column 'queue'"):
        example({"body": "x"}, mapping={"text": "body", "label": "queue"})


def test_numbers_of_a_csv_are_labels(tmp_path):
    path = tmp_path / "hours.csv"
    path.write_text('text,label\n"Printer, again",2.5\nLogin,1e1\n', "utf-8")
    rows = read_rows(str(path), on_bad=lambda problem: pytest.fail(str(problem)))
    settings = DataSettings(train=str(path))
    assert [(e.text, e.label) for e in (to_example(row, settings=settings) for row in rows)] == [
        ("Printer, again", "2.5"),
        ("Login", "1e1"),
    ]


def test_a_text_among_columns_of_unknown_use_is_refused():
    with pytest.raises(DataError) as caught:
        example({"task_id": 3, "text": "Write a function.", "code": "def f(): ..."})
    assert "{prompt: text, completion: code}" in caught.value.hint
    assert "data.form: text" in caught.value.hint


def test_an_explicit_form_wins_over_detection():
    assert example({"text": "a", "label": "b"}, form="text").text == "a"
    with pytest.raises(DataError, match="'messages' is null"):
        example({"prompt": "a", "completion": "b"}, form="chat")
    with pytest.raises(DataError, match="no column 'instruction'"):
        example({"prompt": "a", "completion": "b"}, form="alpaca")


# ----------------------------------------------------------------------------------------------------- mapping


def test_patterns_are_filled_from_columns():
    mapping = {"prompt": "{title}\n\nhours: {hours}", "completion": "{hours}", "system": "who"}
    found = example({"title": "Fix {hours}", "hours": 2.5, "who": "Estimate.", "id": 1}, mapping=mapping)
    assert turns(found) == [("system", "Estimate."), ("user", "Fix {hours}\n\nhours: 2.5"), ("assistant", "2.5")]
    assert found.form == "prompt_completion"
    assert found.columns == {"id": 1}


def test_patterns_reach_nothing_but_columns():
    with pytest.raises(DataError, match=r"no column 'title\.__class__'"):
        example({"title": "a"}, mapping={"text": "{title.__class__}"})


def test_braces_around_a_pattern_stay():
    assert example({"a": "x", "n": 3}, mapping={"text": '{"a": {n}}'}).text == '{"a": 3}'


def test_a_mapped_column_must_hold_text():
    mapping = {"prompt": "text", "completion": "label"}
    with pytest.raises(DataError, match="'label' is a number") as caught:
        example({"text": "a", "label": 3}, mapping=mapping)
    assert "'{label}'" in caught.value.hint
    with pytest.raises(DataError, match="no column 'label'; the row has 'text'"):
        example({"text": "a"}, mapping=mapping)
    with pytest.raises(DataError, match="'label' is null; a pattern takes"):
        example({"text": "a", "label": None}, mapping={"text": "{text} {label}"})


def test_messages_may_stand_in_another_column():
    found = example({"turns": [USER, ASSISTANT], "id": 1}, mapping={"messages": "turns"})
    assert (found.form, turns(found), found.columns) == ("chat", ASKED, {"id": 1})


# ------------------------------------------------------------------------------------ system, weights and tools


def test_a_system_prompt_goes_before_rows_without_one():
    own = chat({"role": "system", "content": "Mine."}, USER, ASSISTANT)
    assert turns(example(own, system="Be brief."))[0] == ("system", "Mine.")
    assert turns(example(chat(USER, ASSISTANT), system="Be brief."))[0] == ("system", "Be brief.")
    with pytest.raises(DataError, match=r"no place for `data\.system`"):
        example({"text": "a"}, system="Be brief.")


def test_weights_say_what_is_trained():
    found = example(chat(USER, ASSISTANT | {"weight": 0}, USER | {"weight": 0}, ASSISTANT | {"weight": 1}))
    assert [message.weight for message in found.messages if message.role == "assistant"] == [0.0, 1.0]
    last_is_read = example(chat(USER, ASSISTANT, USER, {"role": "assistant", "content": "", "weight": 0}))
    assert [message.weight for message in last_is_read.messages if message.role == "assistant"] == [1.0, 0.0]


def test_tools_calls_and_names_are_kept():
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Oslo"}'}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    found = example(
        chat(
            USER | {"name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
            ASSISTANT,
        )
        | {"tools": [tool], "parallel_tool_calls": True}
    )
    assert found.tools == (tool,)
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[0].extra == {"name": "ann"}
    assert found.messages[1].content == ""
    assert found.messages[1].extra["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert found.messages[2].extra == {"tool_call_id": "c1"}
    assert found.columns == {"parallel_tool_calls": True}


def test_the_older_spelling_of_functions():
    found = example(
        chat(
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": "{}"}},
            {"role": "function", "name": "find", "content": "Oslo"},
            ASSISTANT,
        )
        | {"functions": [{"name": "find"}]}
    )
    assert found.tools == ({"type": "function", "function": {"name": "find"}},)
    assert found.messages[1].extra["tool_calls"] == [
        {"type": "function", "function": {"name": "find", "arguments": {}}}
    ]
    assert (found.messages[2].role, found.messages[2].extra) == ("tool", {"name": "find"})


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "17 plus 25 "}, {"type": "text", "text": "is 42."}]
    assert turns(example(chat(USER, {"role": "assistant", "content": parts})))[1] == ("assistant", "17 plus 25 is 42.")


def test_columns_of_a_table_that_are_null_count_as_absent():
    message = USER | {"weight": None, "tool_calls": None, "name": None}
    found = example(chat(message, ASSISTANT | {"tool_calls": None, "weight": None}) | {"tools": None})
    assert turns(found) == ASKED
    assert found.messages[0].extra == {}


# -------------------------------------------------------------------------------------------------- preferences


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, None),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "bad_row"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty_target"),
        ({"prompt": "a", "chosen": "b"}, "bad_row"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT | {"content": "no"}]}, None),
        ({"preferred_output": [ASSISTANT], "non_preferred_output": [ASSISTANT]}, "bad_row"),
        ({"chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": " b"}}, "bad_row"),
    ],
)
def test_defects_of_preference_rows(value, kind):
    defect = preference_defect(Row(Origin("p.jsonl", 2), value))
    assert (defect.kind if defect else None) == kind


# --------------------------------------------------------------------------------------------------- properties

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ROW_KEYS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "response",
    "input",
    "output",
    "instruction",
    "history",
)
ROW_KEYS += ("words", "tags", "text", "label", "system", "tools", "functions", "chosen", "rejected")
TURN_KEYS = (
    "role",
    "content",
    "from",
    "value",
    "weight",
    "tool_calls",
    "function_call",
    "function",
    "name",
    "arguments",
)
keys = st.sampled_from((*ROW_KEYS, *TURN_KEYS, "type"))
words = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "text", "function", "hello", ""])
anything = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=20,
)


@given(anything)
def test_any_value_is_an_example_or_a_problem(value):
    found = examine(Row(Origin("rows.jsonl", 7), value), settings=DataSettings(train="rows.jsonl"))
    if isinstance(found, Problem):
        assert found.severity == "error"
        return
    trained = [message for message in found.messages if message.role == "assistant" and message.weight]
    assert (found.text or "").strip() or found.words or trained
    assert (found.label is not None) == (found.form in ("labelled", "tagged"))
    assert all(message.content.strip() or "tool_calls" in message.extra for message in trained)


spoken = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(spoken, spoken), min_size=1, max_size=4), st.none() | spoken)
def test_conversations_survive_unchanged(pairs, system):
    opening = [{"role": "system", "content": system}] if system else []
    said = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    found = example({"messages": opening + said})
    assert [message.as_dict() for message in found.messages] == opening + said
