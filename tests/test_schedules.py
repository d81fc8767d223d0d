"""Schedules as literal tables: first step, last step, edges."""

from __future__ import annotations

import math

import pytest

from common.numerics.optim import cosine, linear_decay, poly

POLY = [  # base 0.01, 45600 steps, power 0.9: Pascal 1464 of U2PL
    (0, 0.01),
    (1, 0.009999802631362532),
    (570, 0.009887429363102976),
    (22800, 0.005358867312681467),
    (45599, 6.411086574811116e-07),
    (45600, 0.0),
]
COSINE = [  # base 0.01, 200 steps, target 0.001
    (0, 0.01),
    (1, 0.009999444846167473),
    (50, 0.008681980515339464),
    (100, 0.0055),
    (199, 0.0010005551538325272),
    (200, 0.001),
]


@pytest.mark.parametrize(("step", "rate"), POLY)
def test_poly(step, rate):
    assert poly(0.01, step, 45600, 0.9) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("step", "rate"), COSINE)
def test_cosine(step, rate):
    assert cosine(0.01, step, 200, 0.001) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("power", "half"), [(1.0, 0.5), (2.0, 0.25), (0.5, math.sqrt(0.5)), (0.0, 1.0)])
def test_power_of_poly(power, half):
    assert poly(1.0, 5, 10, power) == pytest.approx(half, rel=1e-12)


def test_first_step_is_the_base_exactly():
    assert poly(0.001, 0, 7, 0.9) == 0.001
    assert cosine(0.001, 0, 7, 0.0) == 0.001


@pytest.mark.parametrize(
    ("epoch", "left", "keep", "alpha"),
    [
        (0, 1.0, 80.0, 20.0),
        (1, 0.9875, 80.25, 19.75),
        (40, 0.5, 90.0, 10.0),
        (79, 0.0125, 99.75, 0.25),
        (80, 0.0, 100.0, 0.0),
    ],
)
def test_entropy_percentiles_of_eighty_epochs(epoch, left, keep, alpha):
    """The percentiles of U2PL: 80 % rises to 99.75 %, 20 % falls to 0.25 %."""
    share = linear_decay(epoch, 80)
    assert share == pytest.approx(left, abs=1e-15)
    assert 100.0 - (100.0 - 80.0) * share == pytest.approx(keep, abs=1e-12)
    assert 20.0 * share == pytest.approx(alpha, abs=1e-12)
