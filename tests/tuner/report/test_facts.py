"""What is made of a run's result: the recommendation against what people would have taken."""

from __future__ import annotations

import pytest

from tests.support.report_samples import CONFIG, Page, one, params, point, sample, trial
from train_fn.contract.faults import InputError
from tuner.report.facts import make_run, read_run
from tuner.report.figures.pareto import pareto
from tuner.report.page import render


def test_the_recommendation_is_compared_with_the_default_and_with_the_largest_that_fit():
    default, same_setting, largest = one().comparisons

    assert (default.params, default.number) == (point(1, 8), 0)
    assert default.ratio.value == pytest.approx(2.0)
    assert default.ratio.low <= 2.0 <= default.ratio.high < 2.1
    assert not default.is_tie
    assert same_setting.params == point(4, 2), "its memory was probed, its speed is predicted"
    assert (same_setting.number, same_setting.speed.value) == (None, 64)
    assert same_setting.ratio.value == pytest.approx(100 / 64)
    assert same_setting.ratio.low == pytest.approx(98 / (64 * 1.1))
    assert (largest.params, largest.number) == (point(8, 1, ckpt=True), 2)
    assert largest.ratio.value == pytest.approx(1.25)


def test_a_default_that_runs_out_of_memory_has_no_ratio():
    result = sample()
    result["trials"][0] = trial(0, params(1, 8))
    default, *_ = make_run(result, CONFIG).comparisons
    assert (default.ratio, default.problem) == (None, "runs out of memory")
    assert "is 1\u00d78 fp32: runs out of memory." in Page(render([make_run(result)])).text


def test_a_default_that_is_recommended_is_not_compared_with_itself():
    result = sample(recommended=0, pareto_front=[0])
    run = make_run(result)
    assert run.is_default
    assert point(1, 8) not in {c.params for c in run.comparisons}
    assert "It is the default that people start from." in Page(render([run])).text


def test_without_candidates_of_per_device_one_there_is_no_default():
    result = sample()
    for key in ("trials", "candidates"):
        result[key] = [t for t in result[key] if t["params"]["per_device_train_batch_size"] > 1]
    run = make_run(result)
    assert "the default that people start from" not in {c.what for c in run.comparisons}


def test_speeds_that_noise_cannot_tell_apart_are_a_tie_everywhere():
    result = sample()
    noisy = [0.16, 0.10, 0.05, 0.12, 0.03, 0.09, 0.04, 0.08, 0.06, 0.07]
    result["trials"][0] |= {"step_seconds": noisy, "samples_per_second": 100.0}
    run = make_run(result)
    assert run.ties == [0]
    assert run.comparisons[0].is_tie
    page = Page(render([run])).text
    assert "1\u00d78 fp32, 100 samples/s, a tie" in page
    assert "Noise can't tell it from 1\u00d78 fp32 (#0)." in page
    assert [t["x"] for t in pareto(run)["data"] if t.get("name") == "tie"] == [[100.0]]


def test_a_result_of_an_older_version_makes_a_report_too():
    result = sample()
    for key in ("candidates", "gpus", "written_at", "stopped"):
        del result[key]
    for found in result["trials"]:
        for key in ("started_at", "ended_at", "memory_points", "alloc_retries", "validation_loss_source"):
            del found[key]
    run = make_run(result)
    assert "Start times are not known" in Page(render([run])).text
    assert point(4, 2) in run.candidates, "named in the explanation"


def test_a_disturbed_trial_does_not_stand_for_its_point():
    result = sample()
    disturbed = trial(5, params(2, 4), 60.0, disturbed=["another process on GPU 0"])
    result["trials"].append(disturbed)
    run = make_run(result)
    assert run.trial_of(point(2, 4)).number == 1
    assert run.speed_of(point(2, 4)).value == 100
    text = Page(render([run])).text
    assert "complete, disturbed" in text
    assert "another process on GPU 0" in [v for k, v in Page(render([run])).attributes if k == "title"]


def test_a_folder_without_configuration_is_enough(folders):
    (folders / "one/config.yaml").unlink()
    assert "built-in demo" in Page(render([read_run(folders / "one")])).text
    with pytest.raises(InputError, match="expected an output folder"):
        read_run(folders)
