"""The learning rate's course."""

import math

import pytest

from pagoda.common import PagodaError
from pagoda.train import options
from pagoda.train.schedule import SCHEDULES, multiplier


def test_cosine_is_nanogpts():
    """get_lr of nanoGPT's train.py, written out."""
    lr, min_lr, warmup, last = 6e-4, 6e-5, 20, 100
    for step in range(last + 5):
        if step < warmup:
            expected = lr * (step + 1) / (warmup + 1)
        elif step > last:
            expected = min_lr
        else:
            share = (step - warmup) / (last - warmup)
            expected = min_lr + 0.5 * (1.0 + math.cos(math.pi * share)) * (lr - min_lr)
        assert lr * multiplier("cosine", step, last, warmup, min_lr / lr) == pytest.approx(expected)


def test_linear_falls_evenly_to_its_end():
    rates = [multiplier("linear", step, 10, 0, 0.5) for step in range(11)]
    assert rates == pytest.approx([1 - 0.05 * i for i in range(11)])


def test_constant_stays():
    assert {multiplier("constant", step, 10, 3) for step in range(3, 20)} == {1.0}


def test_wsd_stays_and_decays_over_the_last_share():
    rates = [multiplier("wsd", step, 100, 10, 0.0, 0.2) for step in range(101)]
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(21)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_rises_stays_within_bounds_and_ends_low(schedule):
    rates = [multiplier(schedule, step, 50, 5, 0.1) for step in range(60)]
    assert rates[:6] == pytest.approx([i / 6 for i in range(1, 7)])
    assert max(rates) == rates[5] == 1.0
    assert all(a >= b for a, b in zip(rates[5:], rates[6:]))
    assert rates[50:] == pytest.approx([1.0 if schedule == "constant" else 0.1] * 10)


def test_a_share_of_the_steps_warms_up_too():
    assert [multiplier("cosine", s, 50, 0.1) for s in range(50)] == [multiplier("cosine", s, 50, 5) for s in range(50)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_short_runs_have_a_rate_too(schedule):
    for last in (1, 2):
        for warmup in (0, 1, 2, 100):
            assert all(0 < multiplier(schedule, step, last, warmup) <= 1 for step in range(last))


def test_the_options_name_the_same_schedules():
    assert options.SCHEDULES == SCHEDULES
    with pytest.raises(PagodaError, match="cosine, linear"):
        multiplier("cosin", 0, 10)
