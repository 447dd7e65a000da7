"""A judge behind a real address: both orders, kappa, retries, time-outs, the cache, and a key that is written nowhere."""

import contextlib
import http.server
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tunesmith.errors import DataError, ModelError, NotFoundError, RecipeError
from tunesmith.evaluate import chat_client
from tunesmith.evaluate.judge import SWAPPED, agreement, check_judge, prove_judged, read_labels
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.settings import EvaluateSettings, JudgeSettings
from tunesmith.evaluate.statistics import mcnemar

KEY = "sk-very-secret-0123456789"
Reply = tuple[int, dict[str, str], Any]
Rule = Callable[[str, str, int], "str | Reply"]


class Judge:
    """An OpenAI-compatible server with a rule: (answer A, answer B, number of the request) -> text, or a whole reply."""

    def __init__(self, rule: Rule):
        self.rule, self.asked, self.keys, self.busy, self.most_busy = rule, 0, set[str](), 0, 0
        self.lock = threading.Lock()
        judge = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with contextlib.suppress(BrokenPipeError):  # who asked did not wait
                    judge.reply(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        assert handler.path == "/v1/chat/completions"
        assert (body["model"], [m["role"] for m in body["messages"]]) == ("judge-1", ["system", "user"])
        with self.lock:
            self.asked += 1
            number = self.asked
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            self.keys.add(handler.headers["Authorization"] or "")
        shown = body["messages"][1]["content"]
        one = shown.partition("[Answer A]\n")[2].partition("\n[End of answer A]")[0]
        other = shown.partition("[Answer B]\n")[2].partition("\n[End of answer B]")[0]
        said = self.rule(one, other, number)
        if isinstance(said, str):
            said = 200, {}, {"choices": [{"message": {"role": "assistant", "content": said}}]}
        status, headers, value = said
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        with self.lock:
            self.busy -= 1
        handler.send_response(status)
        for name, text in ({"Content-Length": str(len(content))} | headers).items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(content)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Rule], Judge]]:
    monkeypatch.setattr(chat_client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    started: list[Judge] = []

    def start(rule: Rule) -> Judge:
        started.append(Judge(rule))
        return started[-1]

    yield start
    for judge in started:
        judge.server.shutdown()
        judge.server.server_close()


def longer(a: str, b: str, number: int) -> str:
    return "I compared [[A]] and [[B]]. " + ("[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]")


def always_a(a: str, b: str, number: int) -> str:
    return "[[A]]"


TUNED = ["long answer", "longest answer", "short", "a fairly long answer", "same", "as long"]
BASE = ["short", "x", "not as short", "less", "same", "is long"]


def evaluation() -> Evaluation:
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "outputs": {"tuned": t, "base": b}}
        for i, (t, b) in enumerate(zip(TUNED, BASE, strict=True))
    ]
    return Evaluation({"seed": 0}, rows)


def prove(judge: Judge, folder: Path, **given: Any) -> dict[str, Any]:
    settings = JudgeSettings(**{"url": judge.url, "model": "judge-1", "key_environment": "JUDGE_KEY"} | given)
    return prove_judged(evaluation(), settings=settings, cache=folder / "judge")


def test_an_answer_wins_where_both_orders_are_for_it(serve, tmp_path):
    judge = serve(longer)
    entry = prove(judge, tmp_path)
    found = entry["pairs"]["tuned - base"]
    assert (found["wins"], found["losses"], found["ties"]) == (3, 1, 2)
    assert found["win_rate"]["value"] == pytest.approx((3 + 0.5 * 2) / 6)
    assert found["win_rate"]["low"] < found["win_rate"]["value"] < found["win_rate"]["high"]
    assert found["p"] == mcnemar([1, 1, 0, 1], [0, 0, 1, 0])
    assert (found["order_inconsistent"], found["unreadable_rows"]) == (0, 0)
    assert judge.asked == 2 * 5  # equal answers are not asked about
    assert judge.most_busy <= chat_client.AT_A_TIME
    assert "judge-1 prefers tuned to base in 3 of 6 rows and base in 1" in entry["sentence"]


def test_a_judge_that_takes_the_first_decides_nothing(serve, tmp_path):
    found = prove(serve(always_a), tmp_path)["pairs"]["tuned - base"]
    assert (found["wins"], found["losses"], found["ties"], found["p"]) == (0, 0, 6, 1)
    assert found["win_rate"]["value"] == 0.5
    assert found["order_inconsistent"] == pytest.approx(5 / 6)


def test_what_was_answered_is_not_asked_again_and_the_key_is_written_nowhere(serve, tmp_path):
    judge = serve(longer)
    first = prove(judge, tmp_path)
    asked = judge.asked
    assert prove(judge, tmp_path) == first
    assert judge.asked == asked
    prove(judge, tmp_path, instructions="Shorter is better.")
    assert judge.asked == 2 * asked
    entry = next((tmp_path / "judge").iterdir())
    entry.write_text("{")
    assert prove(judge, tmp_path) == first
    assert judge.keys == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(KEY in path.read_text() for path in files)
    assert KEY not in json.dumps(first)


def test_rows_are_drawn_by_the_seed(serve, tmp_path):
    entry = prove(serve(longer), tmp_path, rows=3)
    assert entry["rows"] == 3
    assert sum(entry["pairs"]["tuned - base"][name] for name in ("wins", "losses", "ties")) == 3


def busy_at_first(a: str, b: str, number: int) -> "str | Reply":
    return (429, {"Retry-After": "0"}, {"error": "slow down"}) if number <= 4 else longer(a, b, number)


def broken_at_first(a: str, b: str, number: int) -> "str | Reply":
    return (
        [(503, {}, b"no"), (200, {}, b"<html>"), (200, {}, {"choices": []})][number % 4 - 1]
        if number % 4
        else longer(a, b, 0)
    )


def test_what_fails_for_a_moment_is_asked_again(serve, tmp_path, monkeypatch):
    assert prove(serve(busy_at_first), tmp_path)["pairs"]["tuned - base"]["wins"] == 3
    monkeypatch.setattr(chat_client, "AT_A_TIME", 1)
    assert prove(serve(broken_at_first), tmp_path)["pairs"]["tuned - base"]["wins"] == 3


def test_a_judge_that_hangs_is_given_up(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_client, "ATTEMPTS", 2)

    def hangs(a: str, b: str, number: int) -> str:
        time.sleep(3)
        return "[[A]]"

    with pytest.raises(ModelError, match=r"does not answer: (TimeoutError|URLError)"):
        prove(serve(hangs), tmp_path, timeout_seconds=0.2)


def test_a_refusal_is_told_at_once_without_the_key(serve, tmp_path):
    judge = serve(lambda a, b, number: (401, {}, {"error": f"Incorrect API key provided: {KEY}"}))
    with pytest.raises(ModelError, match=r"status 401.*Incorrect API key provided: \[key\]") as caught:
        prove(judge, tmp_path)
    assert KEY not in str(caught.value)
    assert judge.asked <= chat_client.AT_A_TIME


def test_a_redirect_does_not_take_the_key_elsewhere(serve, tmp_path):
    other = serve(longer)
    judge = serve(lambda a, b, number: (307, {"Location": f"{other.url}/chat/completions"}, {}))
    with pytest.raises(ModelError, match="status 307"):
        prove(judge, tmp_path)
    assert other.asked == 0


def test_verdicts_that_cannot_be_read_are_counted_or_stop_the_evaluation(serve, tmp_path):
    some = prove(serve(lambda a, b, n: "hm" if a == "x" else longer(a, b, n)), tmp_path)["pairs"]["tuned - base"]
    assert (some["unreadable_rows"], some["wins"], some["ties"]) == (1, 2, 3)
    assert prove(serve(lambda a, b, n: "\ud800 [[A]]"), tmp_path)["pairs"]["tuned - base"]["ties"] == 6
    with pytest.raises(ModelError, match="gave no verdict in 10 of 10 answers"):
        prove(serve(lambda a, b, n: "I like both."), tmp_path)


def test_the_judge_is_held_against_people(serve, tmp_path):
    labels = [
        ("aaa", "b", "a"),
        ("aaa", "b", "a"),
        ("a", "bbb", "b"),
        ("a", "bbb", "a"),
        ("a", "b", "tie"),
        ("a", "bb", "b"),
    ]
    rows = [{"prompt": "?", "a": a, "b": b, "preferred": preferred} for a, b, preferred in labels]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = prove(serve(longer), tmp_path, labels=str(tmp_path / "labels.jsonl"))
    found = entry["agreement"]
    chance = (2 * 3 + 3 * 2 + 1 * 1) / 36
    assert found["same"]["value"] == pytest.approx(5 / 6)
    assert found["kappa"]["value"] == pytest.approx((5 / 6 - chance) / (1 - chance))
    assert -1 <= found["kappa"]["low"] < found["kappa"]["value"] < found["kappa"]["high"] <= 1
    assert "kappa with people" in entry["sentence"]


def test_kappa_of_chance_is_zero():
    random = np.random.default_rng(0)
    judge, people = (random.choice(["a", "b", "tie"], 3000, p=[0.6, 0.3, 0.1]).tolist() for _ in range(2))
    found = agreement(judge, people)["kappa"]
    assert found["low"] < 0 < found["high"]
    assert abs(found["value"]) < 0.05
    assert agreement(people, people)["kappa"]["value"] == pytest.approx(1)
    assert agreement(["a", "a"], ["a", "a"])["kappa"]["value"] == 0
    assert math.isfinite(found["low"])
    assert {SWAPPED[SWAPPED[verdict]] == verdict for verdict in SWAPPED} == {True}


def test_what_a_judge_needs_is_checked_before_anything_runs(tmp_path, monkeypatch):
    given = {"url": "https://example.org/v1", "model": "judge-1"}
    check_judge(JudgeSettings(**given))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(RecipeError, match="JUDGE_KEY is not set"):
        check_judge(JudgeSettings(**given, key_environment="JUDGE_KEY"))
    with pytest.raises(NotFoundError):
        check_judge(JudgeSettings(**given, labels=str(tmp_path / "nowhere.jsonl")))
    (tmp_path / "labels.jsonl").write_text('{"prompt": "?", "a": "x", "b": "y", "preferred": "A"}\n')
    with pytest.raises(DataError, match="preferred: a, b or tie") as caught:
        read_labels(str(tmp_path / "labels.jsonl"))
    assert caught.value.line == 1
    for url in (
        "example.org/v1",
        "file:///etc/passwd",
        "https://user:word@example.org",
        "https://example.org/v1?key=1",
    ):
        with pytest.raises(ValidationError, match="address"):
            JudgeSettings(url=url, model="m")
    with pytest.raises(ValidationError, match="judge has no effect"):
        EvaluateSettings(judge=JudgeSettings(**given), against=())
