"""The demo: what it draws, in the suite; the page, in a real browser where gradio and chromium are."""

import importlib.util
import io

import numpy as np
import pytest
from conftest import learnt
from PIL import Image
from test_cli import fails

from diffrl.cli import main
from diffrl.demo import Easel, launch, page
from diffrl.errors import DiffRLError
from diffrl.types import NO_LABEL


@pytest.fixture(scope="module")
def easel(learnt_run):
    return Easel(learnt_run, 2)


def pixels(captioned):
    """The pictures as they were before they were enlarged, 16 times."""
    return np.stack([np.asarray(picture)[::16, ::16] for picture, _ in captioned])


def test_it_draws_what_sample_draws_beside_the_pretrained_model(easel, learnt_run, tmp_path):
    before, after = easel.draw("bee", [1], 1.5, seed=7)
    for shown, words in {
        "after": (after, ["--label=1", "--control-scale=1.5"]),
        "before": (before, ["--control-scale=0"]),
    }.values():
        out = tmp_path / words[-1]
        assert (
            main(["sample", str(learnt_run), "--prompt=bee", "-n=2", "--seed=7", f"--out={out}", *words])
            == 0
        )
        files = sorted(out.glob("bee*-0?.png"))
        assert np.array_equal(pixels(shown), np.stack([np.asarray(Image.open(file)) for file in files]))
    assert not np.array_equal(pixels(before), pixels(after))


def test_a_caption_is_the_true_measure_and_the_label_that_it_makes(easel):
    """libjpeg writes each picture at the measure's quality; the edge between the classes decides."""
    (attribute,) = easel.reward.attributes
    for captioned in easel.draw("cat", [0], 1.0, seed=3):
        for (_, caption), picture in zip(captioned, pixels(captioned), strict=True):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=95)
            size = len(file.getvalue()) / 1000
            label = int(size <= float(attribute.edges))  # class 1 is the smaller
            assert caption == f"{size:.2f} kB, label {label}"


def test_the_pretrained_pictures_are_drawn_once_for_a_prompt_and_a_seed(easel):
    first, _ = easel.draw("dog", [0], 1.0, seed=1)
    assert easel.draw("dog", [1], 2.0, seed=1)[0] is first
    assert easel.draw("dog", [1], 2.0, seed=2)[0] is not first


def test_each_attribute_offers_its_classes_and_a_run_without_labels_none(
    easel, two_controls, tiny_path, tmp_path
):
    ((title, classes),) = easel.choices
    assert title == "JPEG size"
    assert [words[:2] for words in classes] == ["> ", "<="]
    both = Easel(two_controls, 1)
    assert [title for title, _ in both.choices] == ["JPEG size", "colourfulness"]
    assert len(both.draw("cat", [1, NO_LABEL], 1.0, 0)[1]) == 1
    run = learnt(tmp_path / "run", f"env.model={tiny_path}", "algo=ddpo", "reward=jpeg", "algo.updates=1")
    plain = Easel(run, 1)
    assert plain.choices == []
    ((_, caption),) = plain.draw("cat", [], 1.0, 0)[1]
    assert caption.endswith(" kB")


@pytest.mark.parametrize(
    "choices",
    [[("label", ["0", "1"])], [("attribute 0", ["0", "1"]), ("attribute 1", ["0", "1", "2"])]],
    ids=len,
)
def test_of_a_reward_of_one_s_own_the_classes_are_numbers(choices, tiny_path, tmp_path):
    counts = tuple(len(classes) for _, classes in choices)
    mine = tmp_path / "mine.py"
    mine.write_text(
        f"def red(images, context):\n    return images[:, 0].mean((1, 2))\nred.num_classes = {counts}"
    )
    words = [f"env.model={tiny_path}", "algo=ddpo", f"reward={mine}:red", "algo.updates=1"]
    own = Easel(learnt(tmp_path / "run", *words), 1)
    assert own.choices == choices
    first, second = (pixels(own.draw("cat", [y] * len(counts), 1.0, 0)[1]) for y in (0, 1))
    assert not np.array_equal(first, second)
    with pytest.raises(DiffRLError, match="label=2: out of range; attribute 0"):
        own.draw("cat", [2] * len(counts), 1.0, 0)


def test_mistakes_are_one_line(easel, learnt_run, tmp_path, capsys, monkeypatch):
    with pytest.raises(DiffRLError, match="label=2: out of range"):
        easel.draw("cat", [2], 1.0, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'diffrl[demo]'" in fails(capsys, "demo", learnt_run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert "no such run" in fails(capsys, "demo", tmp_path / "nothing")
    assert "-n 0: must be 1 or more" in fails(capsys, "demo", learnt_run, "-n", "0")


@pytest.fixture(scope="module")
def address(easel):
    pytest.importorskip("gradio", reason="pip install 'diffrl[demo]'")
    blocks = page(easel)
    yield launch(blocks, None)
    blocks.close(verbose=False)


class TestInTheBrowser:
    def opened(self, browser, address, **settings):
        """Return the page once it has drawn, and the list its errors and requests to elsewhere are in."""
        tab, noticed = browser.new_context(**settings).new_page(), []
        tab.on("pageerror", lambda error: noticed.append(str(error)))
        tab.on("request", lambda request: noticed.append(request.url))
        tab.goto(address)
        tab.locator("#run img").nth(1).wait_for()
        own = (address, "data:", "blob:")
        return tab, lambda: [each for each in noticed if not each.startswith(own)]

    def test_it_draws_both_sides_and_again_when_something_is_asked_for(self, browser, address, easel):
        from playwright.sync_api import expect

        tab, noticed = self.opened(browser, address)

        def becomes(label, scale, seed):
            sides = zip(("pretrained", "run"), easel.draw("cat", [label], scale, seed), strict=True)
            for gallery, captioned in sides:
                captions = [caption for _, caption in captioned]
                expect(tab.locator(f"#{gallery} .caption-label")).to_have_text(captions)
            command = f"--label {label} --control-scale {scale:g} --seed {seed} -n 2"
            expect(tab.get_by_text(command)).to_be_visible()

        becomes(1, 1.0, 0)
        tab.get_by_label("0: >").check()
        becomes(0, 1.0, 0)
        tab.get_by_role("button", name="Other noise").click()
        becomes(0, 1.0, 1)
        tab.get_by_role("slider").focus()
        tab.keyboard.press("End")
        tab.get_by_role("button", name="Draw").click()
        becomes(0, 3.0, 1)
        assert noticed() == []

    def test_a_phone_scrolls_one_way_only(self, browser, address):
        tab, _ = self.opened(browser, address, viewport={"width": 390, "height": 844})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
