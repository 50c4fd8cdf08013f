"""The machine's speed from trial to trial, on a clock that is told what to say."""

import random

import pytest
import torch

from train_fn.contract.timing import rate_with_interval, steps_for_target, timing_notes
from train_fn.trial import machine_speed
from train_fn.trial.machine_speed import Drift


@pytest.fixture
def clock(monkeypatch):
    """Every tick takes what `clock.next` says."""

    class Clock:
        def __init__(self):
            self.now, self.next, self.started = 0.0, 1.0, False

        def perf_counter(self):
            self.now += self.next if self.started else 0.0
            self.started = not self.started
            return self.now

    made = Clock()
    monkeypatch.setattr(machine_speed, "time", made)
    return made


def trials(drift, clock, speeds, noise, rng, ticks=20):
    for speed in speeds:
        for _ in range(ticks):
            clock.next = speed * rng.gauss(1, noise)
            drift.tick()
        drift.end_trial()


@pytest.mark.parametrize("sd", [0.0, 0.05])
def test_finds_how_much_trials_differ_beyond_the_noise_of_their_ticks(clock, sd):
    rng, drift = random.Random(0), Drift(torch.device("cpu"))
    trials(drift, clock, [rng.gauss(1, sd) for _ in range(60)], 0.1, rng)
    assert drift.relative_sd() == pytest.approx(sd, rel=0.25, abs=0.01)


def test_a_turn_of_somebody_else_is_not_the_machines_speed(clock):
    """One tick in ten takes five times as long: steps of a hundred times a tick's length hardly notice."""
    rng, drift = random.Random(4), Drift(torch.device("cpu"))
    for _ in range(20):
        for _ in range(20):
            clock.next = rng.gauss(1, 0.05) * (5 if rng.random() < 0.1 else 1)
            drift.tick()
        drift.end_trial()
    assert drift.relative_sd() < 0.02


def test_assumes_something_before_it_has_seen_any(clock):
    drift = Drift(torch.device("cpu"))
    assert drift.relative_sd() == pytest.approx(0.02)
    drift.tick()
    drift.end_trial()  # one tick says nothing
    assert drift.relative_sd() == pytest.approx(0.02)


def test_repetitions_on_a_drifting_machine_lie_within_the_interval(clock):
    """Trials whose machine is 4% faster or slower each time, measured by their own steps and by the ticks."""
    rng, count = random.Random(1), 200
    drift = Drift(torch.device("cpu"))
    intervals, rates = [], []
    for _ in range(count + 1):
        speed = rng.gauss(1, 0.04)
        trials(drift, clock, [speed], 0.02, rng)
        seconds = [speed * rng.gauss(1, 0.02) for _ in range(18)]
        rate, interval = rate_with_interval(16, seconds, [1.0] * 18, drift.relative_sd())
        rates.append(rate)
        intervals.append(interval)
    inside = sum(low <= again <= high for (low, high), again in zip(intervals, rates[1:], strict=False))
    assert 0.9 <= inside / count <= 0.99


def test_says_when_more_steps_would_not_help():
    rate, interval = rate_with_interval(16, [1.0, 1.01, 0.99] * 6, [1.0] * 18, between_sd=0.03)
    assert steps_for_target(rate, interval, 18, 0.03) == float("inf")
    (note,) = timing_notes(rate, interval, 18, 0.03)
    assert "varies by 3.0% from trial to trial, which more steps can't mend" in note
    rng = random.Random(0)
    seconds = [rng.gauss(1, 0.1) for _ in range(18)]
    alone = rate_with_interval(16, seconds, [1.0] * 18)
    with_drift = rate_with_interval(16, seconds, [1.0] * 18, between_sd=0.005)
    assert steps_for_target(*with_drift, 18, 0.005) > steps_for_target(*alone, 18)


def slow_parts(drift, clock, speeds, rng, noise=0.03):
    found = []
    for speed in speeds:
        for _ in range(20):
            clock.next = speed * rng.gauss(1, noise)
            drift.tick()
        found.append(drift.end_trial())
    return found


def test_a_trial_on_a_machine_that_is_slower_than_usual_is_told_and_left_out(clock):
    rng, drift = random.Random(2), Drift(torch.device("cpu"))
    usual = [rng.gauss(1, 0.01) for _ in range(12)]
    assert slow_parts(drift, clock, usual, rng) == [0.0] * 12
    before = drift.relative_sd()
    assert slow_parts(drift, clock, [1.5], rng) == pytest.approx([0.5], abs=0.05)
    assert drift.relative_sd() == before
    assert slow_parts(drift, clock, [1.0, 0.7], rng) == [0.0, 0.0], "faster is no disturbance"


def test_what_is_usual_on_a_machine_is_no_disturbance(clock):
    rng, drift = random.Random(3), Drift(torch.device("cpu"))
    varying = slow_parts(drift, clock, [rng.gauss(1, 0.1) for _ in range(100)], rng)
    assert sum(part > 0 for part in varying[20:]) <= 2, "it varies"
    steady = Drift(torch.device("cpu"))
    slow_parts(steady, clock, [1.0] * 5, rng)
    found = slow_parts(steady, clock, [1.5] * 12, rng)
    assert all(found[:4])
    assert not any(found[8:]), "a machine that stays slow is a slow machine"
    assert slow_parts(Drift(torch.device("cpu")), clock, [1.0, 2.0, 1.0], rng) == [0.0] * 3, "too few to tell"
