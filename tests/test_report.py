"""The report of a suite laid by hand, as text and in a real browser."""

import base64
import io
import json
import re

import pytest
from PIL import Image
from test_cli import fails

from diffrl import config, settings_file
from diffrl.benchmarks.charts import over_training
from diffrl.cli import main

COLUMNS = {"accuracy": "eval/accuracy", "KL (nats)": "eval/kl_nats"}
ACCURACY = {"ctrl": [0.9, 0.8, 1.0], "svdd <b>": [0.5, 0.4, 0.6], "pretrained": [0.25, 0.25, 0.25]}
KL = {"ctrl": 120.0, "svdd <b>": None, "pretrained": 0.0}


def cell(row, seed):
    last = {
        "update": 10,
        "eval/accuracy": ACCURACY[row][seed],
        "eval/kl_nats": KL[row],
        "eval/confusion": [[3, 1], [0, 4]],
        "spent/pictures": 160.0,
        "spent/network_calls": 3200.0,
        "spent/seconds": 12.0,
    }
    first = last | {"update": 0, "eval/accuracy": 0.25, "spent/pictures": 0.0}
    command = f"diffrl train algo={row.split()[0]} seed={seed}"
    return {
        "row": row,
        "seed": seed,
        "command": command,
        "minutes": 1.0,
        "points": [first, last],
        "words": [],
        "version": "0.0.9",
        "hardware": "an abacus",
        "commit": f"c{min(seed, 1)}",
    }


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Return a suite's folder: three rows of three seeds, one crashed, a picture of one cell."""
    folder = tmp_path_factory.mktemp("cells") / "mine"
    folder.mkdir()
    cells = [cell(row, seed) for row in ACCURACY for seed in range(3)]
    settings = {"rows": {row: [] for row in [*ACCURACY, "crash"]}, "columns": COLUMNS}
    settings |= {"curve": {"accuracy": "eval/accuracy"}}
    cells.append({"row": "crash", "seed": 0, "failed": True})
    stored = {"suite": "mine", "settings": settings, "rows": [], "cells": cells}
    (folder / "mine.json").write_text(json.dumps(stored))
    pictures = folder / "ctrl-seed1" / "pictures"  # the first seed's folder is gone
    pictures.mkdir(parents=True)
    Image.new("RGB", (1600, 800), "red").save(pictures / "grid-0010.png")
    return folder


@pytest.fixture(scope="module")
def page(suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(suite), "--out", str(out)]) == 0
    return out


def test_every_row_is_there_with_mean_and_interval(page):
    html = page.read_text()
    # of .9, .8, 1.0: mean .9, standard deviation .1, t(.975, 2) = 4.303, so .1 x 4.303 / sqrt(3) = .248
    assert re.search(r'data-value="0\.9[^"]*">0\.900 <small>&plusmn; 0\.248</small>', html)
    assert "svdd &lt;b&gt;" in html
    assert "crash (1 failed)" in html
    seeds = [int(n) for n in re.findall(r'<tr><td[^>]*>[^<]*</td><td data-value="(\d)">', html)]
    assert seeds == [3] * len(ACCURACY) + [0]
    assert "Measured by diffrl 0.0.9 on an abacus, at c0, c1." in html
    assert "diffrl train algo=ctrl seed=0" in html
    assert html.count("<svg") == 2  # learning, and control against distance
    assert html.count("data:image/webp;base64,") == 1
    assert page.stat().st_size < 1e6


def test_nothing_is_fetched_from_outside(page):
    html = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', html.replace("xlink:", ""))
    assert "@import" not in html
    assert "url(http" not in html


def test_a_suite_whose_cells_all_failed_has_a_table_still(suite, tmp_path):
    stored = json.loads((suite / "mine.json").read_text())
    stored["cells"] = [{"row": row, "seed": 0, "failed": True} for row in ACCURACY]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(stored))
    assert main(["report", str(path), "--out", str(tmp_path / "r.html")]) == 0
    assert "ctrl (1 failed)" in (tmp_path / "r.html").read_text()


def test_a_run_is_a_suite_of_one_row(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        json.dumps({"update": 0, "eval/reward_mean": -2.5, "spent/seconds": 0.0})
    )
    out = tmp_path / "r.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert "-2.500" in out.read_text()
    assert "<svg" not in out.read_text()  # one evaluation is no curve


def test_a_run_has_a_curve_of_each_measure_and_the_command_that_made_it(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    settings_file.write(config.load(["algo.gamma=7", "seed=3"]), run / "config.yaml")
    points = [
        {"update": 0, "eval/reward_mean": -2.5, "eval/accuracy": 0.2, "spent/pictures": 0},
        {"update": 9, "eval/reward_mean": -1.5, "eval/accuracy": None, "spent/pictures": 80},
        {"update": 10, "eval/reward_mean": -1.0, "eval/accuracy": 0.3, "spent/pictures": 160},
    ]
    cut = '\n{"update": 11, "eval/rew'  # as it is being written
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, points)) + cut)
    assert over_training(points, {"reward": "eval/reward_mean", "accuracy": ["a", "eval/accuracy"]}) == {
        "reward": ([0, 80, 160], [-2.5, -1.5, -1.0]),
        "accuracy": ([0, 160], [0.2, 0.3]),
    }
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    assert html.count("<svg") == 1
    assert html.count(">pictures drawn</text>") == 2
    assert "diffrl train algo.gamma=7.0 seed=3" in html


def test_several_runs_are_rows_of_one_table_with_one_chart_of_their_curves(suite, tmp_path):
    sources = []
    for number, name in enumerate(["a/gamma=1", "a/gamma=2", "b/gamma=2"]):
        run = tmp_path / name
        run.mkdir(parents=True)
        points = [cell("ctrl", number)["points"][at] | {"eval/accuracy": 0.25 * number} for at in (0, 1)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, points)))
        sources.append(str(run))
    out = tmp_path / "r.html"
    assert main(["report", sources[0], str(suite), *sources[1:], "--out", str(out)]) == 0
    html = out.read_text()
    assert html.count('class="sortable"') == 2  # the suite's, and that of the runs
    assert "<title>diffrl: mine, runs</title>" in html
    rows = re.findall(r'<tr><td data-value="([^"]*)"', html)[-3:]
    assert rows == ["gamma=1", *sources[1:]]  # two are called alike: by their paths
    assert html.count("<h3>Learning</h3>") == 2
    assert html.count(">pictures drawn</text>") == 2


def test_a_run_that_is_given_twice_is_one_row(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, cell("ctrl", 0)["points"])))
    out = tmp_path / "r.html"
    assert main(["report", str(run), f"{run}/../one", "--out", str(out)]) == 0
    assert re.findall(
        r'<tr><td data-value="([^"]*)"[^>]*>[^<]*</td><td data-value="(\d)">', out.read_text()
    ) == [("one", "1")]


def test_the_picture_is_the_last_update_s_however_many_digits_it_has(tmp_path):
    run = tmp_path / "one"
    (run / "pictures").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"update": 10000, "eval/reward_mean": 0.5}))
    for name, colour in {"grid-9500": "red", "grid-10000": "blue", "my-own": "green"}.items():
        Image.new("RGB", (8, 8), colour).save(run / "pictures" / f"{name}.png")
    out = tmp_path / "r.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    (data,) = re.findall(r"data:image/webp;base64,([\w+/=]+)", out.read_text())
    red, green, blue = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((4, 4))
    assert blue > 200 > 50 > max(red, green)


def test_a_folder_of_results_is_all_the_suites_in_it(suite, tmp_path, monkeypatch, capsys):
    """As `compare --out` writes them, whatever the folder is called; not what else lies there."""
    monkeypatch.chdir(suite)
    out = tmp_path / "r.html"
    assert main(["report", ".", "mine.json", str(suite), "--out", str(out)]) == 0
    assert "<title>diffrl: mine</title>" in out.read_text()
    results = tmp_path / "results"
    results.mkdir()
    (results / "other.json").write_text('{"kills": 30}')
    assert "neither a run nor a suite's result" in fails(capsys, "report", results)
    stored = json.loads((suite / "mine.json").read_text())
    for name in ("b", "a"):
        (results / f"{name}.json").write_text(json.dumps(stored | {"suite": name}))
    assert main(["report", str(results), "--out", str(out)]) == 0
    assert "<title>diffrl: a, b</title>" in out.read_text()
    (results / "b.json").write_text(json.dumps(stored)[:-40])
    assert "b.json: not a whole result" in fails(capsys, "report", results)


def test_confusion_has_the_labels_names(suite, tmp_path):
    stored = json.loads((suite / "mine.json").read_text())
    stored["cells"][0]["points"][-1]["eval/labels"] = ["1,0", "1,1"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(stored))
    assert main(["report", str(path), "--out", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    assert html.count("<th>1,0</th>") == 2  # asked for, and true
    assert html.count("<th>0</th>") == 4  # the other two methods': results of before have no names


def test_a_suite_over_a_setting_has_a_panel_for_each_of_its_measures(suite, tmp_path):
    stored = json.loads((suite / "mine.json").read_text())
    stored["settings"]["rows"] |= {"ctrl": ["algo.gamma=3"], "pretrained": ["algo.gamma=0"]}
    against = {"gamma": dict.fromkeys(["ctrl", "pretrained"], "algo.gamma")}
    stored["settings"] |= {"curve": COLUMNS, "against": against}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(stored))
    assert main(["report", str(path), "--out", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "Against gamma" in html
    assert html.count(">gamma</text>") == 2  # accuracy and KL, side by side
    assert "Learning" not in html


def test_what_is_no_result_is_named(suite, tmp_path, capsys):
    assert "neither a run nor a suite's result" in fails(capsys, "report", tmp_path / "nothing")
    broken = tmp_path / "broken.json"
    broken.write_text((suite / "mine.json").read_text()[:-40])
    assert "not a whole result" in fails(capsys, "report", broken)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    assert "no evaluation" in fails(capsys, "report", empty)


class TestInTheBrowser:
    def opened(self, browser, page, **settings):
        """Return the page, with the list that its errors and requests are written to."""
        tab, noticed = browser.new_context(**settings).new_page(), []
        tab.on("console", lambda message: noticed.append(message.text))
        tab.on("pageerror", lambda error: noticed.append(str(error)))
        tab.on("request", lambda request: noticed.append(request.url))
        tab.goto(f"file://{page}")
        tab.wait_for_load_state("networkidle")
        noticed[:] = [each for each in noticed if not each.startswith(("data:", f"file://{page}"))]
        return tab, noticed

    def test_it_opens_without_an_error_or_a_request_and_sorts(self, browser, page):
        tab, noticed = self.opened(browser, page)
        assert noticed == []

        def names():
            return [
                each.split(" ")[0]
                for each in tab.locator("table.sortable td:first-child").all_inner_texts()
            ]

        assert names() == ["ctrl", "svdd", "pretrained", "crash"]
        tab.get_by_role("button", name="accuracy").click()
        assert names() == ["ctrl", "svdd", "pretrained", "crash"]
        tab.get_by_role("button", name="accuracy").click()
        assert names() == ["pretrained", "svdd", "ctrl", "crash"]  # what has no value stays last
        assert tab.locator("th[aria-sort=ascending]").inner_text().startswith("accuracy")
        tab.get_by_role("button", name="method").click()
        assert names() == ["svdd", "pretrained", "ctrl", "crash"]
        assert noticed == []

    def test_a_phone_scrolls_tables_and_charts_and_not_the_page(self, browser, page):
        tab, _ = self.opened(browser, page, viewport={"width": 390, "height": 844})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        charts = tab.locator("figure svg")
        assert charts.count() > 0
        for chart in charts.all():
            assert chart.bounding_box()["width"] >= 900  # or nobody could read its labels

    def test_it_is_dark_in_the_dark(self, browser, page):
        shades = []
        for scheme in ("light", "dark"):
            tab, _ = self.opened(browser, page, color_scheme=scheme)
            colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            shades.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
        assert shades[0] > 700 > 200 > shades[1]
