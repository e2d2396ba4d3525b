"""JSON as records hold it: what is no figure is none, whatever its size."""

from __future__ import annotations

import math

import pytest

from sip_engine.monitoring.curves import Curves
from sip_engine.utils.jsonl import parse_json, parse_object


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1" + "0" * 400, math.inf),
        ("-1" + "0" * 400, -math.inf),
        ("9" * 308, int("9" * 308)),
        ("-" + "9" * 308, -int("9" * 308)),
        ("9" * 5000, math.inf),
    ],
    ids=["huge", "huge negative", "largest", "largest negative", "beyond what int reads"],
)
def test_an_integer_that_no_float_holds_is_infinite(text: str, value: float) -> None:
    assert parse_json(text) == value and math.isinf(float(parse_json(text))) == math.isinf(value)


def test_a_curve_leaves_it_out() -> None:
    curves = Curves()
    for step, text in enumerate(('{"loss": 1.5}', f'{{"loss": {"7" * 400}}}', '{"loss": 0.5}')):
        curves.add(step, parse_object(text, "metrics.jsonl"))
    assert curves["loss"].values.tolist() == [1.5, 0.5]
