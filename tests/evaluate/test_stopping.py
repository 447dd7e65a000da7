"""The best step and the last one, in hindsight."""

import pytest

from tunesmith.evaluate.stopping import hindsight


def lines(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * i, "validation_loss": loss} for i, loss in enumerate(losses, 1)]


def test_what_training_on_would_have_cost() -> None:
    found = hindsight([{"step": 1, "loss": 9.0}, *lines(1.5, 1.28, 1.31, 1.40)], best_step=20)
    assert found is not None
    assert (found["best_loss"], found["last_loss"], found["last_step"], found["steps_after"]) == (1.28, 1.40, 40, 20)
    assert found["worse"] == pytest.approx(0.12)
    assert "best at step 20 of 40" in found["sentence"]
    assert "those of the last step are 0.1200 worse" in found["sentence"]


def test_a_run_that_was_best_at_its_end_says_so() -> None:
    found = hindsight(lines(1.5, 1.28), best_step=20)
    assert found is not None
    assert found["worse"] == 0
    assert "more steps might help" in found["sentence"]


def test_of_steps_written_twice_the_later_counts() -> None:
    found = hindsight([*lines(1.0, 0.9), *lines(1.5, 1.2)], best_step=20)
    assert found is not None
    assert found["best_loss"] == 1.2


def test_without_two_validations_there_is_no_hindsight() -> None:
    assert hindsight(lines(1.0), best_step=10) is None
    assert hindsight(lines(1.0, 2.0), best_step=None) is None
    assert hindsight([], best_step=None) is None
