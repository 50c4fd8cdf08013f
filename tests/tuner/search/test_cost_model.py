"""The cost models find the physics that made the data, and say how far they can be trusted."""

import math

import numpy as np
import pytest

from tuner.search.cost_model import AffineCosts, Effect, Observation, Point, Priors

PRIORS = Priors(
    constant={"half": Effect(math.log(0.6), 0.3)},
    slope={"half": Effect(math.log(0.6), 0.3)},
    own_sd=(0.05, 0.1),
    scatter_sd=0.01,
    curvature_sd=0.01,
)
PLAIN, HALF = frozenset({"full"}), frozenset({"half"})


def point(setting, size):
    return Point(setting, 1.0, 100.0 * size, size)


def cost(setting, size):
    """1 GB and 2 MB per token; in half precision 0.45 GB and 1.1 MB."""
    fixed, slope = (1000.0, 2.0) if setting == PLAIN else (450.0, 1.1)
    return fixed + slope * 100 * size


def seen(setting, size, sd=0.001):
    return Observation(point(setting, size), cost(setting, size), sd)


def error(costs, setting, size):
    log_cost, sd = costs.predict([point(setting, size)])
    return math.exp(log_cost[0]) / cost(setting, size) - 1, sd[0]


def test_two_points_of_a_setting_are_enough_for_all_of_it():
    asked = [point(PLAIN, s) for s in (1, 2, 4, 8, 16)]
    costs = AffineCosts([seen(PLAIN, 1), seen(PLAIN, 8)], asked, PRIORS)
    for size in (2, 4, 16):
        assert abs(error(costs, PLAIN, size)[0]) < 0.02


def test_another_setting_is_guessed_from_defaults_and_learnt_from_one_point():
    asked = [point(s, size) for s in (PLAIN, HALF) for size in (1, 8)]
    known = [seen(PLAIN, 1), seen(PLAIN, 2), seen(PLAIN, 8)]
    before = error(AffineCosts(known, asked, PRIORS), HALF, 8)
    after = error(AffineCosts([*known, seen(HALF, 4)], asked, PRIORS), HALF, 8)
    assert abs(before[0]) < 0.2
    assert before[1] > 0.1
    assert abs(after[0]) < 0.04
    assert after[1] < before[1] / 2


def test_memory_that_ran_out_raises_what_was_believed_too_low_and_nothing_else():
    asked = [point(PLAIN, s) for s in (1, 4)]
    alone = AffineCosts([seen(PLAIN, 1)], asked, PRIORS).predict(asked)[0]
    high = [Observation(point(PLAIN, 4), 5000.0, 0.01, is_lower_bound=True)]
    low = [Observation(point(PLAIN, 4), 100.0, 0.01, is_lower_bound=True)]
    assert math.exp(AffineCosts([seen(PLAIN, 1), *high], asked, PRIORS).predict(asked)[0][1]) > 4000
    assert AffineCosts([seen(PLAIN, 1), *low], asked, PRIORS).predict(asked)[0] == pytest.approx(alone)


def test_draws_have_the_spread_that_is_stated():
    asked = [point(s, size) for s in (PLAIN, HALF) for size in (1, 8)]
    costs = AffineCosts([seen(PLAIN, 1), seen(PLAIN, 8)], asked, PRIORS)
    rng = np.random.default_rng(0)
    drawn = costs.draw(
        asked, rng.standard_normal((4000, costs.num_parameters)), rng.standard_normal((4000, len(asked)))
    )
    mean, sd = costs.predict(asked)
    assert drawn.mean(axis=0) == pytest.approx(mean, abs=0.03)
    assert drawn.std(axis=0) == pytest.approx(sd, rel=0.1)
    assert np.corrcoef(drawn[:, 2], drawn[:, 3])[0, 1] > 0.5, "one setting's points move together"


def test_points_that_scatter_make_the_model_modest():
    sizes = (1, 2, 4, 8, 16)
    asked = [point(PLAIN, s) for s in (*sizes, 32)]
    calm = AffineCosts([seen(PLAIN, s) for s in sizes], asked, PRIORS)
    rough = [
        Observation(point(PLAIN, s), cost(PLAIN, s) * (1 + 0.1 * (-1) ** i), 0.001)
        for i, s in enumerate(sizes)
    ]
    assert AffineCosts(rough, asked, PRIORS).predict(asked)[1][-1] > 3 * calm.predict(asked)[1][-1]


def test_nothing_is_said_without_an_exact_cost():
    with pytest.raises(ValueError, match="exact"):
        AffineCosts([Observation(point(PLAIN, 1), 1.0, 0.1, is_lower_bound=True)], [], PRIORS)
