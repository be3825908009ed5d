"""What bench.control_plane makes of its measurements."""

from __future__ import annotations

import math

from bench.asker import ROUTES, Answer
from bench.control_plane import Measured, as_json, bucket_quantile, parser, quantile, render
from elastic_daemon.commands.operator_commands import make_console


def test_quantiles() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert quantile([3.0], 0.99) == 3.0
    assert math.isnan(quantile([], 0.99))


def test_quantiles_of_buckets_are_upper_bounds() -> None:
    buckets = {0.01: 50.0, 0.05: 98.0, 0.1: 99.0, math.inf: 100.0}
    assert (bucket_quantile(buckets, 0.5), bucket_quantile(buckets, 0.99)) == (0.01, 0.1)
    assert bucket_quantile(buckets, 1.0) == math.inf
    assert math.isnan(bucket_quantile({math.inf: 0.0}, 0.99))


def test_answers_that_overlap_a_recovery_belong_to_it() -> None:
    asked = (9.0, 9.95, 10.5, 11.0, 12.0)
    answers = [Answer("port", "/health", at, 0.1, 200) for at in asked]
    measured = Measured(answers, [(10.0, 11.05)])
    assert len(measured.seconds_of("port", "/health", True)) == 3
    assert len(measured.seconds_of("port", "/health", False)) == 2
    assert measured.seconds_of("socket", "/health", True) == []
    assert measured.problems == []


def test_what_was_refused_is_a_problem() -> None:
    measured = Measured([Answer("port", "/health", 1.0, 0.1, 503)])
    assert "1 answers were not 200" in measured.problems[0]


def test_the_report() -> None:
    measured = Measured([Answer("port", route, 1.0, 0.03, 200) for route in ROUTES], lag={0.05: 9.0, math.inf: 10.0})
    console = make_console()
    with console.capture() as capture:
        console.print(render(measured, 0.5))
    assert "not met" in capture.get()
    assert as_json(measured)["lag"] == {"0.05": 9.0, "inf": 10.0}
    assert parser().parse_args([]).lives == 3
