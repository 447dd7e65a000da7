"""Numbers and times as people read them."""

import pytest

from tunesmith.evaluate.texts import bytes_text, clip, duration_text, number_text, time_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1,234,567"), (3.0, "3"), (0.123456, "0.1235"), (1.5e-7, "1.50e-07"), (-2.5, "-2.5")],
)
def test_numbers(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (47.2, "47 s"), (59.7, "1 min 00 s"), (134, "2 min 14 s"), (11_100, "3 h 05 min")],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (512, "512 B"), (2048, "2.0 KiB"), (2**30 * 1.5, "1.5 GiB")])
def test_bytes(size, text):
    assert bytes_text(size) == text


def test_times():
    assert time_text("2026-11-20T12:04:11+02:00") == "2026-11-20 10:04 UTC"
    assert time_text("yesterday") == "yesterday"


def test_clip():
    assert clip("short") == "short"
    assert clip("x" * 1100, 100) == "x" * 100 + " … (1,000 more characters)"
