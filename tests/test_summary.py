"""The arithmetic of a suite's table, and how it is printed."""

import math

import numpy as np
import pytest
from conftest import assert_close
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.metrics import f1_score

from diffrl import plot
from diffrl.benchmarks import charts, result, suites, summary
from diffrl.log import print_wide


def test_interval_is_students():
    mean, half = summary.interval([1.0, 2.0, 6.0])
    assert_close(mean, 3.0, atol=1e-12)
    # t of 2 degrees at .975 is 4.3027; standard deviation sqrt(7)
    assert_close(half, 4.30265 * math.sqrt(7 / 3), atol=1e-4)
    assert summary.interval([2.5]) == (2.5, None)


def test_a_row_is_the_mean_over_seeds_of_the_last_evaluation():
    def cell(seed, last):
        return {"row": "a", "seed": seed, "minutes": 1.0, "points": [{"m": 9.0}, {"m": last, "l": [1]}]}

    (row,) = summary.summarise("s", [cell(0, 1.0), cell(1, 3.0), {"row": "a", "seed": 2, "failed": True}])
    assert (row["suite"], row["method"], row["n_seeds"], row["failed"]) == ("s", "a", 2, 1)
    assert (row["m"], row["m_max"]) == (2.0, 3.0)
    assert_close(row["m_ci95"], 12.7062, atol=1e-3)  # t of 1 degree; standard error 1
    assert "l" not in row


def test_one_seed_has_the_interval_of_its_pictures_and_each_class_is_a_measure():
    point = {"eval/accuracy": 0.75, "eval/per_class": [0.5, 1.0], "eval/confusion": [[50, 50], [0, 100]]}
    (row,) = summary.summarise("s", [{"row": "a", "seed": 0, "minutes": 1.0, "points": [point]}])
    assert (row["eval/per_class/0"], row["eval/per_class/1"]) == (0.5, 1.0)
    # 1.96 sqrt(p (1 - p) / n); on a grid of 1/n
    assert_close(row["eval/per_class/0_ci95"], 1.96 * 0.05, atol=0.006)
    assert_close(row["eval/accuracy_ci95"], 1.96 * math.sqrt(0.75 * 0.25 / 200), atol=0.003)
    # Wilson's of 100 hits of 100 is [1 / (1 + 1.96^2 / 100), 1]
    assert_close(row["eval/per_class/1_ci95"], (1 - 1 / (1 + 1.96**2 / 100)) / 2, atol=1e-5)


def test_fidelity_is_a_share_of_the_pictures_too():
    cells = [
        {"row": "a", "seed": seed, "minutes": 1.0, "points": [{"eval/prompt_fidelity": p, "eval/n": 100}]}
        for seed, p in enumerate((0.6, 0.6))
    ]
    (row,) = summary.summarise("s", cells)
    assert_close(row["eval/prompt_fidelity_ci95"], 1.96 * math.sqrt(0.6 * 0.4 / 200), atol=0.002)


def test_macro_f1_of_counts_is_scikit_learn_s_of_pictures():
    counts = np.array([[5, 2, 0, 0], [1, 7, 3, 0], [0, 4, 6, 0], [0, 0, 0, 0]])
    asked, true = np.repeat(np.argwhere(counts >= 0), counts.ravel(), 0).T
    expected = f1_score(asked, true, average="macro", labels=range(4), zero_division=0)
    assert_close(summary._macro_f1(counts), expected, atol=1e-12)


def test_seeds_that_agree_by_chance_have_the_interval_of_their_pictures():
    def cell(seed, *hits):
        point = {
            "eval/accuracy": sum(hits) / 200,
            "eval/macro_f1": 0.5,
            "eval/per_class": [hit / 100 for hit in hits],
            "eval/confusion": [[hits[0], 100 - hits[0]], [100 - hits[1], hits[1]]],
        }
        return {"row": "a", "seed": seed, "minutes": 1.0, "points": [point]}

    (row,) = summary.summarise("s", [cell(0, 50, 70), cell(1, 70, 50)])
    # 1.96 sqrt(p (1 - p) / n), of 400 pictures
    assert_close(row["eval/accuracy_ci95"], 1.96 * math.sqrt(0.6 * 0.4 / 400), atol=0.004)
    assert_close(row["eval/per_class/0_ci95"], 12.7062 * 0.1, atol=1e-3)  # Student's is the wider
    # of classes that are alike macro F1 is nearly the accuracy, and as uncertain
    assert_close(row["eval/macro_f1_ci95"], row["eval/accuracy_ci95"], atol=0.006)


def test_each_attribute_s_accuracy_has_the_interval_of_its_pictures():
    point = {
        "eval/size/accuracy": 0.8,
        "eval/size/macro_f1": 0.8,
        "eval/size/confusion": [[40, 10], [10, 40]],
    }
    (row,) = summary.summarise("s", [{"row": "a", "seed": 0, "minutes": 1.0, "points": [point]}])
    for name in ("accuracy", "macro_f1"):
        assert_close(row[f"eval/size/{name}_ci95"], 1.96 * 0.04, atol=0.008)


def test_a_class_of_one_picture_has_the_widest_interval():
    point = {"eval/accuracy": 0.5, "eval/per_class": [1.0, 0.0], "eval/confusion": [[1, 0], [1, 0]]}
    (row,) = summary.summarise("s", [{"row": "a", "seed": 0, "minutes": 1.0, "points": [point]}])
    assert row["eval/per_class/0"] == 1.0
    assert_close(row["eval/per_class/0_ci95"], (1 - 1 / (1 + 1.96**2)) / 2, atol=1e-4)  # Wilson's


def test_seconds_are_the_fewest_of_the_seeds_as_other_work_only_adds_to_them():
    def cell(seed, reward, *seconds):
        points = [{"reward": reward, "spent/seconds": s, "spent/pictures": 8.0 * s} for s in seconds]
        return {"row": "a", "seed": seed, "minutes": 1.0, "points": points}

    records = [cell(0, 1.0, 10.0, 20.0), cell(1, 3.0, 15.0, 90.0)]
    (row,) = summary.summarise("s", records)
    assert (row["spent/seconds"], row["spent/seconds_ci95"]) == (20.0, None)
    assert summary.over_seeds("eval/seconds_per_image", [0.5, 0.25]) == (0.25, None)
    assert row["spent/pictures"] == 440.0
    for record in records:
        for update, point in enumerate(record["points"]):
            point |= {"spent/network_calls": 1.0, "update": update}
    suite = suites.Suite(rows={"a": []}, columns={"r": "reward"}, curve={"r": "reward"})
    panels = charts.curves(suite, records)
    assert panels["seconds"][0].x == [10.0, 20.0]
    assert panels["pictures drawn"][0].x == [100.0, 440.0]
    assert panels["seconds"][0].y == [2.0, 2.0]
    odd = suites.Suite(rows={"a": []}, columns={}, curve={"r": ["update_", "reward"]})
    assert charts.curves(odd, records)["seconds"][0].y == [2.0, 2.0]  # the first that all points have
    records[0]["points"].append(records[0]["points"][-1] | {"update": 2})  # the other seed stopped before
    assert charts.curves(suite, records)["seconds"][0].x == [10.0, 20.0]


SWEEP = {
    "rows": {
        "b": ["algo.gamma=9"],
        "ctrl, wide": ["algo.gamma=1", "algo.gamma=20"],
        "ctrl, small": ["algo.gamma=3"],
        "ctrl, not yet": ["algo.gamma=5"],
        "b, sparse": [],
    },
    "settings": ["algo.gamma=7"],
    "columns": {"r": "m"},
    "curve": {"r": "m", "s": ["missing", "n"]},
    "against": {"gamma": {"ctrl": "algo.gamma", "b": "algo.gamma"}},
}


def test_a_setting_that_the_rows_differ_in_is_the_axis_in_its_order():
    done = ("ctrl, wide", "ctrl, small", "b")
    rows = [
        {"method": row, "m": float(at), "m_ci95": None, "n": 9.0, "n_ci95": 0.5}
        for at, row in enumerate(done)
    ]
    panels = charts.over_setting(suites.Suite(**SWEEP), rows)
    assert {title: [line.name for line in lines] for title, lines in panels.items()} == {
        "r": ["ctrl", "b"],
        "s": ["ctrl", "b"],
    }
    ctrl, b = panels["r"]
    assert (ctrl.x, ctrl.y, ctrl.band) == ((3.0, 20.0), (1.0, 0.0), (0.0, 0.0))
    assert (b.x, b.y) == ((9.0,), (2.0,))  # the last word said counts
    assert panels["s"][0].band == (0.5, 0.5)
    assert suites.Suite(**SWEEP).lines()["b"] == {"b": 9.0, "b, sparse": 7.0}  # of the settings of all


def test_a_sweep_is_a_picture_beside_its_numbers(tmp_path):
    point = {"m": 1.0, "n": 2.0, "spent/pictures": 1.0}
    cell = {"row": "b", "seed": 0, "minutes": 1.0, "points": [point]}
    result.finish("s", suites.Suite(**SWEEP), [cell], [], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.png"]


def test_accuracy_against_its_price_has_a_point_for_each_row_that_pays_it(tmp_path):
    def cell(row, accuracy, kl, seconds, fidelity):
        point = {"eval/accuracy": accuracy, "eval/kl_nats": kl, "eval/seconds_per_image": seconds}
        point |= {"eval/prompt_fidelity": fidelity}
        return {"row": row, "seed": 0, "minutes": 1.0, "points": [point]}

    records = [
        cell("svdd", 0.75, None, 3.0, 0.9),
        cell("ctrl", 0.5, 100.0, 0.05, 0.8),
        cell("none", 0.25, 0.0, 0.05, 0.9),
    ]
    suite = suites.Suite(rows={"svdd": [], "ctrl": [], "none": []}, columns={"a": "eval/accuracy"})
    rows = result.finish("s", suite, records, [], tmp_path)
    (chart,) = charts.charts(suite, records, rows)
    panels, *_ = chart.data
    assert {
        title: {line.name: (*line.x, *line.y) for line in lines} for title, lines in panels.items()
    } == {
        "KL to the pretrained model (nats)": {"ctrl": (100.0, 0.5), "none": (0.0, 0.25)},
        "seconds a picture": {"svdd": (3.0, 0.75), "ctrl": (0.05, 0.5), "none": (0.05, 0.25)},
        "prompt fidelity": {"svdd": (0.9, 0.75), "ctrl": (0.8, 0.5), "none": (0.9, 0.25)},
    }
    seconds, kl, fidelity = chart.figure(*chart.data).axes
    left, right = fidelity.get_xlim()
    assert left > right  # less of it is a price
    assert [kl.get_xlim()[0] < kl.get_xlim()[1], seconds.get_xscale()] == [True, "symlog"]
    colors = [{bar.get_label(): bar[0].get_color() for bar in axes.containers} for axes in (seconds, kl)]
    assert {name: colors[0][name] for name in colors[1]} == colors[1]  # though svdd is in one alone
    assert len(set(colors[0].values())) == 3
    assert (tmp_path / "s.png").is_file()
    assert charts.prices(rows[1:2]) == {}  # one point compares nothing
    # nor does one price
    assert list(charts.prices(rows[1:])) == ["KL to the pretrained model (nats)", "prompt fidelity"]


def test_a_record_has_the_bare_names_of_an_evaluation():
    row = {"suite": "s", "n_seeds": 3, "eval/accuracy": 0.5, "eval/accuracy_ci95": 0.1, "exact/tv": 0.2}
    suite = suites.Suite(rows={"a": []}, columns={"a": "eval/accuracy", "KL": ["eval/kl_nats", "x"]})
    names = ["suite", "n_seeds", "accuracy", "accuracy_ci95", "exact/tv", "kl_nats", "kl_nats_ci95"]
    record = summary.bare(row, suite)
    assert list(record) == names
    assert (record["accuracy"], record["kl_nats"], record["kl_nats_ci95"]) == (0.5, None, None)


def test_numbers_have_the_digits_that_their_size_deserves():
    texts = [
        summary.as_text(number, scale) for number, scale in ((12345.6, 1e4), (73.0, 451.0), (86.87, 86.87))
    ]
    assert texts == ["12,346", "73", "86.9"]
    assert [summary.as_text(0.0257, 0.566), summary.as_text(-1.958, -1.958)] == ["0.026", "-1.958"]


def test_a_table_of_many_columns_is_printed_whole(capsys):
    names = {f"a measure of some length, number {i}": "x" for i in range(12)}
    row = {"method": "one", "n_seeds": 3, "failed": 0, "x": 1.5, "x_ci95": 0.25}
    print_wide(summary.table(suites.Suite(rows={"one": []}, columns=names), [row]))
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert out.count("1.500 ± 0.250") == 12


@pytest.mark.parametrize("panels", [1, 2])
def test_a_legend_of_long_names_stays_within_its_figure(panels):
    lines = [plot.Line(f"a method, variant {n} of it", [n], [0.5], [0.1]) for n in range(4)]
    figure = plot.frontier({f"price {n}": lines for n in range(panels)}, "accuracy")
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
