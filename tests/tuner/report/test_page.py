"""What a report says, and that no value of a run can be anything but text in it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.support.report_samples import BUDGET, CONFIG, HOSTILE, hostile, params, sample, trial
from train_fn.contract.faults import InputError
from train_fn.contract.trials import TrialParams
from tuner.report.__main__ import main
from tuner.report.facts import make_run, read_run
from tuner.report.figures.batches import memory, speed
from tuner.report.figures.pareto import pareto
from tuner.report.figures.parts import styles
from tuner.report.figures.plots import across, lanes
from tuner.report.figures.timeline import SHOWN_PAUSE_SECONDS, timeline
from tuner.report.page import render
from tuner.report.runs import common_points, differences, gpu_names, is_same_work, labelled
from tuner.report.write import LiveReport, without_secrets


def point(*args, **more):
    return TrialParams.from_dict(params(*args, **more))


def one(**more):
    return make_run(sample(**more), CONFIG)


class Page(HTMLParser):
    """Elements, and text by what it stands in; scripts and styles apart."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.scripts, self._inside = [], [], [], None
        self.attributes = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("script", "style"):
            self._inside = tag
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None if tag == self._inside else self._inside

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True)
def short_plotly(monkeypatch):
    """The pages of these tests are not drawn: 5 MB less of each."""
    monkeypatch.setattr("tuner.report.page._plotly", lambda: "/* plotly */")


# The recommendation against what people would have taken.


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


def test_the_sentence_has_the_numbers():
    text = Page(render([one()])).text
    assert "Use per-device batch 2 with 4 accumulation steps in fp32, without gradient checkpointing." in text
    assert "It trains 100 samples/s : 2.00\u00d7 the default that people start from" in text
    assert (
        "1.56\u00d7 the largest batch that fits in this setting (4\u00d72 fp32, 64 samples/s, predicted)"
        in text
    )
    assert (
        "1.25\u00d7 the largest batch that fits at all (8\u00d71 fp32, checkpointing, 80 samples/s)" in text
    )
    assert "200 MiB of 0.98 GiB, 80% free" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": [], "pareto_front": [], "recommended": None, "explanation": None}, "Nothing is measured"),
        (
            {
                "trials": [trial(0, params(1, 8))],
                "pareto_front": [],
                "recommended": None,
                "explanation": None,
                "why": "None of the 1 settings measured is feasible (1 oom).",
            },
            "None of the 1 settings measured is feasible",
        ),
    ],
)
def test_a_run_without_a_recommendation_says_so(changes, words):
    assert words in Page(render([one(**changes)])).text


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


def test_the_closest_alternatives_are_explained_the_next_larger_batch_first():
    result = sample()
    why = result["explanation"]
    larger = {"params": params(4, 2), "why": "slower by 30%, needs 900 MiB", "slower_by": {"value": 0.3}}
    close = {"params": params(1, 8), "why": "slower by 3%", "slower_by": {"value": 0.03}}
    beyond = {"params": params(8, 1), "why": "out of memory", "slower_by": None}
    why |= {"next_larger": larger, "batches": [close, larger | {"why": "slower by 30%"}, beyond, beyond]}
    why["settings"] *= 7
    text = Page(render([make_run(result)])).text
    asked = text[text.index("Why not another?") : text.index("more in result.json")]
    assert [asked.index(a["why"]) for a in (larger, close, beyond)] == sorted(
        asked.index(a["why"]) for a in (larger, close, beyond)
    )
    assert asked.endswith("And 3 "), "one batch and two settings"


def test_a_new_generation_is_compared_with_the_last():
    before = {
        "study": "nightly", "recommended": 3, "params": params(4, 2, "bf16"), "samples_per_second": 80.0,
        "samples_per_second_ci95": [78.0, 82.0], "validation_loss": 2.0, "measured_at": "2026-11-23T22:10:00",
        "changed": [{"key": "driver", "from": "550.54", "to": "570.1"}],
    }  # fmt: skip
    text = Page(render([one(compared_with=before)])).text
    assert "Since nightly (2026-11-23) driver has changed from 550.54 to 570.1." in text
    assert "It recommended 4\u00d72 bf16 at 80 samples/s: this is 1.25\u00d7 that." in text
    nothing = before | {"recommended": None, "params": None, "samples_per_second": None}
    assert "It recommended nothing." in Page(render([one(compared_with=nothing)])).text


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


# Plots.


def settled(figure):
    """The figure with colours for the page's names of them, and nothing that plotly does not know."""
    text = json.dumps({k: v for k, v in figure.items() if k != "unit"}, allow_nan=False)
    return json.loads(re.sub(r'"@\w+"', '"#123456"', text))


def every_figure(run):
    return [pareto(run), speed(run), memory(run), lanes(timeline(run))]


@pytest.mark.parametrize("changes", [{}, {"trials": [], "pareto_front": [], "recommended": None}])
def test_plotly_accepts_every_figure(changes):
    import plotly.graph_objects as go  # a second of it

    run = one(**changes)
    for figure in [*every_figure(run), across([run, run])]:
        if figure is not None:
            go.Figure(settled(figure))  # raises where a property or its value is unknown


def test_unbounded_intervals_are_drawn_and_are_not_in_the_json():
    result = sample()
    result["trials"][0]["samples_per_second_ci95"] = [0.0, None]
    for figure in every_figure(make_run(result)):
        settled(figure)
    assert "(interval not known yet)" in json.dumps(pareto(make_run(result)))


def test_settings_differ_in_colour_and_symbol_and_checkpointing_in_dash_too():
    looks = styles(one())
    assert len({(s.colour, s.symbol, s.dash) for s in looks.values()}) == len(looks) == 4
    for (_, checkpointing, _), style in looks.items():
        assert (style.dash == "dash") is checkpointing is style.symbol.endswith("-open")


def test_points_without_a_result_stand_apart_in_the_pareto_plot():
    figure = pareto(one())
    main = [x for t in figure["data"] if "error_x" in t for x in t["x"]]
    apart = [t for t in figure["data"] if t.get("xaxis") == "x2"]
    assert sorted(main) == [50.0, 80.0, 100.0, 100.1]
    assert [(t["name"], t["text"]) for t in apart] == [("fp32", ["8\u00d71"]), ("bf16", ["8\u00d71"])]
    assert [t["marker"]["size"] for t in apart] == [[7], [10]], "one is known from a probe only"
    assert max(figure["layout"]["yaxis2"]["domain"]) < min(figure["layout"]["yaxis"]["domain"])


def test_the_recommended_point_and_those_it_is_compared_with_have_names():
    notes = {a["text"]: (a.get("x"), a["y"]) for a in pareto(one())["layout"]["annotations"]}
    assert notes["2\u00d74"] == (100.0, 2.0)
    assert notes["1\u00d78"] == (50.0, 2.0)
    assert notes["8\u00d71"] == (80.0, 2.001)
    assert notes["within 1% of the lowest loss: a tie"][1] == pytest.approx(2.02), "in the band's upper edge"


def test_names_of_points_that_are_near_one_another_stand_at_different_heights():
    def heights(speed):
        result = sample()
        for found in result["trials"]:
            if found["samples_per_second"] == 80.0:
                found |= {"samples_per_second": speed, "samples_per_second_ci95": [speed - 1, speed + 1]}
        notes = {a["text"]: a for a in pareto(make_run(result))["layout"]["annotations"]}
        return [notes[name].get("yshift") for name in ("8\u00d71", "2\u00d74")]

    assert heights(80.0) == [9, 9]
    assert heights(99.0) == [9, 22]


def test_the_loss_axis_is_never_narrower_than_the_tolerance():
    low, high = pareto(one())["layout"]["yaxis"]["range"]
    assert low < 2.0
    assert high > 2.5
    result = sample()
    for found in result["trials"]:
        found["validation_loss"] = found["validation_loss"] and 2.0
    low, high = pareto(make_run(result))["layout"]["yaxis"]["range"]
    assert high - low > 0.02 * 1.2


def test_memory_shows_budget_measured_probed_predicted_and_what_ran_out():
    figure = memory(one())
    assert figure["unit"] == "MiB"
    assert [s["y0"] for s in figure["layout"]["shapes"]] == [BUDGET / 2**20]
    traces = [t for t in figure["data"] if t["name"] == "fp32"]
    assert [t["line"]["dash"] for t in traces] == ["dot", "solid"]
    assert traces[0]["y"] == [105, 210, 420, 840]
    assert list(zip(traces[1]["x"], traces[1]["y"], strict=True)) == [(1, 100), (2, 200), (4, 900)]
    crosses = {t["legendgroup"]: (t["x"], t["y"]) for t in figure["data"] if t["name"] == "out of memory"}
    assert crosses["s0"] == ([8], [1000.0]), "need unknown: on the budget"
    assert crosses["s2"] == ([8], [pytest.approx(0.96 * 1300)]), "needs 1250 MiB: at the upper edge"


def test_speed_has_a_dotted_line_where_it_is_only_predicted_and_none_beyond_memory():
    traces = [t for t in speed(one())["data"] if t["name"] == "fp32"]
    dotted, guessed, measured = traces
    assert dotted["line"]["dash"] == "dot"
    assert [round(x) for x in dotted["x"]] == [1, 2, 4], "8x1 ran out of memory"
    assert [round(x) for x in guessed["x"]] == [4]
    assert measured["y"] == [50.0, 100.0]
    assert measured["error_y"]["array"] == pytest.approx([1.0, 2.0])


# Time.


def test_phases_add_up_to_the_trials():
    found = timeline(one())
    assert found.is_exact
    assert found.seconds == {
        "hand-over": 5.0, "setup": 2.5, "probe": 5.0, "train": 30.0, "validate": 5.0, "release": 2.5
    }  # fmt: skip
    assert [s.start for s in found.spans if s.phase == "hand-over"] == [0, 10, 20, 30, 40]


def test_a_pause_between_two_runs_of_a_study_is_cut_out():
    result = sample()
    for found in result["trials"][3:]:
        for key in ("started_at", "ended_at"):
            found[key] = found[key].replace("2026-11-24T22", "2026-11-25T07")
    found = timeline(make_run(result))
    assert found.breaks == [(30 + SHOWN_PAUSE_SECONDS / 2, 9 * 3600)]
    assert [s.start for s in found.spans if s.phase == "hand-over"] == [0, 10, 20, 35, 45]
    notes = [a["text"] for a in lanes(found)["layout"]["annotations"]]
    assert notes == ["9 h 00 min later"]


def test_lanes_side_by_side():
    result = sample()
    for found in result["trials"]:
        number = found["number"]
        found |= {"lane": number % 2, "ended_at": f"2026-11-24T22:00:{10 * (number // 2 + 1):02d}.000+00:00"}
    found = timeline(make_run(result))
    assert found.lanes == [0, 1]
    starts = {
        lane: [s.start for s in found.spans if s.lane == lane and s.phase == "hand-over"] for lane in (0, 1)
    }
    assert starts == {0: [0, 10, 20], 1: [0, 10]}


# No value is anything but text.


def test_hostile_text_stays_text():
    result, config = hostile()
    html = render(labelled([make_run(result, config), make_run(copy.deepcopy(result), config)]))
    page = Page(html)
    plain = Page(render(labelled([one(), one()])))
    assert page.tags.count("script") == plain.tags.count("script") == 3
    assert "img" not in page.tags
    assert not [a for a in page.attributes if a[0].startswith("on")]
    assert page.text.count(HOSTILE) >= 12, "it is shown as what it is"
    assert "</" not in page.scripts[1], "the figures' JSON can't end its element"


def test_plotly_gets_hostile_text_without_tags():
    result, config = hostile()
    for figure in every_figure(make_run(result, config)):
        words = json.dumps(figure).replace("<b>", "", 1)
        assert "<img" not in words
        assert "</script" not in words
        assert "template" not in words, "%{x} in a template would be a formula"


def test_the_page_may_load_nothing():
    html = render([one()])
    page = Page(html)
    policy = dict(page.attributes)["content"]
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "default-src 'none'" in html
    assert policy is not None
    assert not [v for k, v in page.attributes if k in ("src", "href") and v != "data:,"]


# Several runs.


def test_runs_are_compared_by_what_differs():
    other = sample(
        device="cuda", gpus=[{"name": "NVIDIA L4"}] * 2, versions={"ray": "2.60.0", "torch": "2.14.0"}
    )
    runs = labelled([one(), make_run(other, CONFIG.replace("512", "1024").replace("0.01", "0.02"))])
    assert [r.label for r in runs] == ["A", "B"]
    assert gpu_names(runs[1]) == "2 \u00d7 NVIDIA L4"
    assert differences(runs) == [
        ("device", ["cpu", "cuda"]),
        ("GPUs", ["", "2 \u00d7 NVIDIA L4"]),
        ("data.max_length", ["512", "1024"]),
        ("torch (version)", ["2.13.0", "2.14.0"]),
    ]
    assert not is_same_work(runs)
    text = Page(render(runs)).text
    assert "2 runs compared" in text
    assert "not of the same work" in text


def test_points_that_both_runs_measured_are_put_side_by_side():
    other = sample()
    other["trials"] = other["trials"][:2]
    runs = labelled([one(), make_run(other, CONFIG)])
    assert is_same_work(runs)
    assert common_points(runs) == [point(1, 8), point(2, 4)]
    figure = across(runs)
    assert [(t["name"], t["x"]) for t in figure["data"]] == [("A", [50.0, 100.0]), ("B", [50.0, 100.0])]
    other["trials"] = []
    assert across([one(), make_run(other)]) is None


# The program, and the run that writes it.


@pytest.fixture
def folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(sample(study=name)))
        (tmp_path / name / "config.yaml").write_text(CONFIG)
    return tmp_path


def test_a_report_lies_beside_the_result(folders, capsys):
    assert main([str(folders / "one")]) == 0
    assert "one" in Page((folders / "one/report.html").read_text()).text
    assert capsys.readouterr().out == f"Report: {folders}/one/report.html\n"
    assert main([str(folders / "two/result.json")]) == 0
    assert (folders / "two/report.html").is_file()


def test_several_runs_make_one_report_where_one_is(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert main(["one", "two"]) == 0
    assert "2 runs compared" in Page((folders / "report.html").read_text()).text
    assert main(["one", "two", "--output", "week.html"]) == 0
    assert (folders / "week.html").is_file()


def test_what_is_no_run_is_named(folders, capsys):
    (folders / "broken.json").write_text("{")
    (folders / "other.json").write_text("[1]")
    assert main([str(folders / n) for n in ("one", "none", "broken.json", "other.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(folders / n) for n in ("none", "broken.json", "other.json")
    ]
    assert "no result.json can be read there; expected an output folder of tuner.run" in lines[0]
    assert main([str(folders / "one"), "--output", str(folders / "broken.json/file.html")]) == 2
    assert "--output: " in capsys.readouterr().err


def test_help_needs_no_heavy_import():
    code = "import sys; from tuner.report.__main__ import _parser; _parser(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"jinja2", "plotly", "optuna", "yaml", "numpy", "pydantic"} & set(found.split())


def test_a_running_search_writes_now_and_then_and_at_its_end(tmp_path):
    now = [0.0]
    report = LiveReport(tmp_path, clock=lambda: now[0])

    def text():
        return Page((tmp_path / "report.html").read_text()).text

    report.update(sample(study="first"))
    assert "first" in text()
    assert "The search is still running" in text()
    now[0] = 14.0
    report.update(sample(study="second"))
    assert "first" in text()
    now[0] = 15.0
    report.update(sample(study="third"))
    assert "third" in text()
    report.finish(sample(study="last"))
    assert "last" in text()
    assert "still running" not in text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_no_secret_gets_into_a_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-of-the-hub")
    result = sample(why='postgresql://me:hunter22@db/x "quoted", s3cr3t-of-the-hub')
    result["trials"][0]["detail"] = 'password=hunter22"next'
    LiveReport(tmp_path).finish(result)
    page = (tmp_path / "report.html").read_text()
    assert "hunter22" not in page
    assert "s3cr3t" not in page
    assert result["trials"][0]["detail"].startswith("password=hunter22"), "the record itself stays"
    odd = ["a\n\x1e\nb", {"c": [1, None, "token=abcdefgh"]}]
    assert without_secrets(odd) == ["a\n\x1e\nb", {"c": [1, None, "token=***"]}]


def test_a_report_that_cannot_be_made_or_written_harms_nothing_and_is_said_in_a_line(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()  # as somebody may have it, who put something there
    said = []
    report = LiveReport(tmp_path, said.append)
    report.update(sample())
    report.finish(sample())
    report.finish({"trials": "nonsense"})
    again = f". Nothing else is lost: python -m tuner.report {tmp_path} makes it anew"
    assert [line.removesuffix(again) for line in said] == [
        "report.html could not be written: IsADirectoryError: Is a directory",
        "report.html could not be written: AttributeError: 'str' object has no attribute 'get'",
    ]
    assert caplog.text.count("report.html could not be written") == 3


def test_a_folder_without_configuration_is_enough(folders):
    (folders / "one/config.yaml").unlink()
    assert "built-in demo" in Page(render([read_run(folders / "one")])).text
    with pytest.raises(InputError, match="expected an output folder"):
        read_run(folders)
