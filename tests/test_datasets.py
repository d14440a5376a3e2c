import json
import os
import shutil

import pytest
import torch
from conftest import assert_close
from PIL import Image

from diffrl import datasets
from diffrl.datasets import PictureFiles, draw, read, stream
from diffrl.errors import DiffRLError
from diffrl.rewards import fit
from diffrl.rewards.classifier import Classifier
from diffrl.rewards.fit import fit_attribute
from diffrl.rewards.jpeg import jpeg_kilobytes
from diffrl.rewards.log_likelihood import Attribute, FitReport, LogLikelihood
from diffrl.rewards.measures import MEASURES

REPORT = FitReport(0, 0, 0.0, 0.0, 0.0, 0.0, 1.0, ())
BOTH = ["compressibility", "colourfulness"]


def paint(folder, *names):
    """Write flat pictures, of red 0, 10, 20, ..."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (12, 9), (10 * number, 0, 0)).save(folder / name)
    return folder


def noise(folder, count=60):
    """Write noise of growing strength as PNG, and return it as a tensor too."""
    folder.mkdir()
    strength = torch.linspace(0, 0.3, count).view(-1, 1, 1, 1)
    grey = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = (255 * (0.5 + strength * grey).clamp(0, 1)).round().byte()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return images


def table(folder, header, cells):
    """Give the pictures of `noise` a column."""
    rows = [f"{number:03}.png,{cell}" for number, cell in enumerate(cells)]
    (folder / "metadata.csv").write_text("\n".join([f"file_name,{header}", *rows]))


def told(folder, measures=("compressibility",), num_classes=(2,)):
    return read(folder, list(measures), list(num_classes))


def files(folder, side=16, workers=0, **settings):
    return PictureFiles(told(folder, **settings)[0], side, workers)


def everything(data):
    return list(stream(data, torch.arange(len(data)), 4))


class TestKinds:
    def test_a_csv_s_columns_are_found_by_name_with_blanks_before_them(self, tmp_path):
        folder = paint(tmp_path / "d", "a.png", "b.png")
        text = 'Score, Img_path, Caption\n"-129.36", b.png, "a cat, sitting"\n 61.5,a.png,\n'
        (folder / "metadata.csv").write_text(text)
        entries, notes = told(folder)
        assert [entry.path for entry in entries] == [str(folder / "b.png"), str(folder / "a.png")]
        assert [entry.prompt for entry in entries] == ["a cat, sitting", None]
        assert [entry.score["compressibility"] for entry in entries] == [-129.36, 61.5]
        assert notes == ["classes of compressibility are by the column 'score'"]

    def test_json_lines_hold_scores_of_both_measures_as_strings(self, tmp_path):
        folder = paint(tmp_path / "d", "a.png")
        row = {"file_name": "a.png", "text": "cat", "col_score": "5.87", "comp_score": "-129.36"}
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
        ((entry,), _) = told(folder, BOTH, [2, 2])
        assert entry.score == {"colourfulness": 5.87, "compressibility": -129.36}

    @pytest.mark.parametrize(
        "cells", [{"label": "1;0"}, {"label": [1, 0]}, {"label1": 1, "label2": "0"}, {"label": "1; 0"}]
    )
    def test_a_label_of_two_attributes(self, tmp_path, cells):
        folder = paint(tmp_path / "d", "a.png")
        row = {"file_name": "a.png", "col_score": "x"} | cells  # beside a label, a score does not matter
        (folder / "metadata.jsonl").write_text(json.dumps(row))
        ((entry,), _) = told(folder, BOTH, [2, 2])
        assert entry.label == {"compressibility": 1, "colourfulness": 0}
        assert entry.score == {}

    def test_ava_s_list_names_pictures_and_its_votes_are_no_aesthetic_score(self, tmp_path):
        folder = tmp_path / "ava"
        folder.mkdir()
        paint(folder / "images", "954175.jpg", "7.jpg")
        votes = "0 0 0 0 1 0 0 0 0 3"
        lines = [f"1 7 {votes} 1 22 1396", "2 9 none", "", f"3 954175 {'-1 ' * 10} 1 2 3"]
        lines += [f"4 954175 {votes}", f"5 8 {votes} 0 0 0", f"6 6 {votes}"]
        (folder / "AVA.txt").write_text("\n".join(lines))
        entries, notes = told(folder, ["aesthetic"])
        names = [str(folder / "images" / f"{name}.jpg") for name in (7, 954175, 8, 6)]
        assert [entry.path for entry in entries] == names
        assert [entry.score for entry in entries] == [{}] * 4
        assert "3 of 7 lines do not parse and are left out, the first is line 2" in notes[0]
        assert len(everything(files(folder))[0].images) == 2  # 8 and 6 are missing

    def test_pictures_become_squares_of_the_model_s_side_in_zero_to_one(self, tmp_path):
        folder = paint(tmp_path / "d", "a.png", "b.png", "c.png")
        (batch,) = everything(files(folder, side=8))
        assert batch.images.shape == (3, 3, 8, 8)
        assert_close(batch.images[:, 0, 4, 4], torch.tensor([0.0, 10, 20]) / 255, atol=1e-7)
        assert batch.images[:, 1:].max() == 0
        assert batch.prompts == [None] * 3
        assert batch.label == batch.score == {}


class TestPlaces:
    @pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link.png", "sub/../../secret.png"])
    def test_a_name_that_leads_out_is_refused_and_not_opened(self, tmp_path, monkeypatch, name):
        folder = paint(tmp_path / "d", "a.png")
        paint(tmp_path, "secret.png")
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        monkeypatch.setattr(Image, "open", None)
        (folder / "metadata.csv").write_text(f"file_name\na.png\n{name}\n")
        with pytest.raises(DiffRLError, match=rf"metadata.csv, line 3: '{name}' leads outside"):
            told(folder)

    def test_so_is_a_link_among_plain_pictures(self, tmp_path):
        folder = paint(tmp_path / "d", "a.png")
        paint(tmp_path, "secret.png")
        (folder / "b.png").symlink_to("../secret.png")
        with pytest.raises(DiffRLError, match=r"'b.png' leads outside"):
            told(folder)

    def test_a_folder_within_is_fine(self, tmp_path):
        folder = tmp_path / "d"
        folder.mkdir()
        paint(folder / "sub", "a.png")
        (folder / "metadata.csv").write_text("file_name\nsub/a.png\n")
        assert len(everything(files(folder))[0].images) == 1


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metadata.csv", "file_name,label\na.png,2\n", "line 2: label='2' is unknown; .* 0 to 1"),
        ("metadata.csv", "file_name,label\na.png,-1\n", "line 2: label='-1' is unknown"),
        ("metadata.csv", "file_name,label\na.png,cat\n", "line 2: label='cat' is not a whole number"),
        ("metadata.csv", "file_name,label\na.png,1;0\n", r"line 2: label='1;0' has 2 number\(s\)"),
        ("metadata.csv", "file_name,label\na.png,1\na.png,\n", "line 3: it has no label"),
        ("metadata.csv", "file_name,score\na.png,1\na.png,high\n", "line 3: score='high' is not a number"),
        ("metadata.csv", "file_name,score\na.png,1\na.png,\n", "line 3: score='' is not a number"),
        ("metadata.csv", "file_name,score\na.png,nan\n", "line 2: score='nan' is not a number"),
        ("metadata.csv", "file_name,text\na.png,a cat, sitting\n", "line 2: more cells than columns"),
        ("metadata.csv", "name,text\na.png,cat\n", "line 2: it has no 'file_name'"),
        ("metadata.csv", "file_name\n", "no row in it"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name"\n', "line 2: not a JSON object"),
        ("metadata.jsonl", "[]\n", "line 1: not a JSON object"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png"}\n{"file_name": "a.png", "score": 1}\n',
            "line 1: score='' is not a number",
        ),
        ("metadata.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("AVA.txt", "1 2 3\n", "no folder 'images' beside it"),
    ],
)
def test_a_row_that_does_not_parse_is_named(tmp_path, name, text, expected):
    folder = paint(tmp_path / "d", "a.png")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DiffRLError, match=rf"{name}.*{expected}"):
        told(folder)


def test_a_list_that_is_not_ava_s_and_two_lists_are_refused(tmp_path):
    folder = paint(tmp_path / "d", "a.png")
    (folder / "images").mkdir()
    (folder / "AVA.txt").write_text("image,score\n1 2 0 0 0 0 0 0 0 0 0 1\na,1\n")
    with pytest.raises(DiffRLError, match=r"AVA.txt: 2 of 3 lines are not AVA's .* first is line 1"):
        told(folder)
    (folder / "metadata.csv").write_text("file_name\na.png\n")
    with pytest.raises(DiffRLError, match=r"it has metadata.csv and AVA.txt; keep one"):
        told(folder)


class TestStream:
    def test_unreadable_pictures_are_left_out_and_counted(self, tmp_path):
        folder = paint(tmp_path / "d", *(f"{n}.png" for n in range(6)))
        (folder / "0.png").write_bytes(b"x")
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-30])
        data = files(folder)
        batches = list(stream(data, torch.tensor([5, 3, 0, 4]), 2))
        assert [batch.index.tolist() for batch in batches] == [[5], [4]]
        red = torch.cat([batch.images[:, 0, 0, 0] for batch in batches])
        assert_close(red, torch.tensor([50, 40]) / 255, atol=1e-7)
        assert data.unreadable == {0, 3}

    def test_of_unreadable_pictures_alone_the_first_is_named(self, tmp_path):
        folder = paint(tmp_path / "d", "a.png", "b.png")
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(b"x")
        with pytest.raises(DiffRLError, match=r"a.png: not a whole picture, nor is any other of the 2"):
            everything(files(folder))

    def test_workers_read_the_same_in_the_same_order_and_no_global_number_is_drawn(self, tmp_path):
        folder = paint(tmp_path / "d", *(f"{n}.png" for n in range(9)))
        (folder / "4.png").write_bytes(b"x")
        before = torch.random.get_rng_state()
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        alone, helped = (list(stream(files(folder, workers=n), order, 2)) for n in (0, 2))
        assert torch.equal(before, torch.random.get_rng_state())
        for one, other in zip(alone, helped, strict=True):
            assert torch.equal(one.index, other.index)
            assert torch.equal(one.images, other.images)

    def test_draws_are_uniform_over_the_readable_pictures_and_repeat(self, tmp_path):
        folder = paint(tmp_path / "d", *(f"{n}.png" for n in range(4)))
        (folder / "2.png").write_bytes(b"x")

        def drawn():
            batches = draw(files(folder, side=8), 1200, torch.Generator().manual_seed(0))
            return torch.cat([batch.index for batch in batches])

        counts = drawn().bincount(minlength=4)
        assert counts.sum() == 1200
        assert counts[2] == 0
        assert_close(counts[[0, 1, 3]] / 1200, [1 / 3] * 3, atol=0.045)  # three standard deviations
        assert torch.equal(drawn(), drawn())


class TestFit:
    def fitted(self, images, features="dct", edges=None, num_classes=2):
        return fit_attribute(
            "compressibility", images, edges, num_classes, features=features, seed=0, from_pretrained=True
        )

    @pytest.mark.parametrize("features", ["dct", "cnn"])
    def test_files_give_the_classifier_of_the_same_in_memory(self, tmp_path, monkeypatch, features):
        monkeypatch.setattr(fit, "EPOCHS", 3)
        images = noise(tmp_path / "d", 30)
        one, other = self.fitted(files(tmp_path / "d"), features), self.fitted(images, features)
        assert one.report == other.report
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)

    def test_streaming_seven_at_a_time_gives_the_same_classifier(self, tmp_path, monkeypatch):
        images = noise(tmp_path / "d")
        whole = self.fitted(images)
        monkeypatch.setattr(datasets, "READ_BATCH", 7)
        parts = self.fitted(files(tmp_path / "d"))
        for name, value in whole.state_dict().items():
            assert_close(parts.state_dict()[name], value, atol=1e-4)
        assert parts.report.class_counts == whole.report.class_counts

    def test_a_broken_picture_is_in_neither_part(self, tmp_path):
        noise(tmp_path / "d")
        (tmp_path / "d" / "017.png").write_bytes(b"x")
        report = self.fitted(files(tmp_path / "d")).report
        assert (report.num_train, report.num_held_out) == (47, 12)
        assert sum(report.class_counts) == 59

    def test_labels_of_the_file_are_learnt_and_the_edges_separate_as_many(self, tmp_path):
        """Of 60 pictures the 15 largest are class 0: what the true measure with the right edge says too."""
        images = noise(tmp_path / "d")
        label = torch.ones(60, dtype=torch.int64)
        label[jpeg_kilobytes(images / 255).argsort(descending=True)[:15]] = 0
        table(tmp_path / "d", "label", label.tolist())
        attribute = self.fitted(files(tmp_path / "d"))
        assert attribute.report.class_counts == (15, 45)
        assert torch.equal(attribute.true_class(images / 255), label)

    def test_scores_stand_in_for_the_true_measure_whatever_their_sign(self, tmp_path):
        """1 to 60 kB, or minus that as CTRL has it; the last class holds the smallest."""
        noise(tmp_path / "d")
        for sign in (1, -1):
            table(tmp_path / "d", "score", [sign * (number + 1) for number in range(60)])
            attribute = self.fitted(files(tmp_path / "d"), edges=[20.0])
            assert attribute.report.class_counts == (40, 20)
        attribute = self.fitted(files(tmp_path / "d"), num_classes=3)
        assert_close(attribute.edges, [20 + 2 / 3, 40 + 1 / 3], atol=1e-4)  # quantiles of 1 to 60


def test_the_label_of_a_picture_is_its_own_else_its_score_s_else_true(tmp_path):
    images = noise(tmp_path / "d", 4)
    edges = dict(zip(BOTH, [1.0, 5.0], strict=True))
    reward = LogLikelihood(
        [Attribute(name, Classifier(2), torch.tensor([edge]), REPORT) for name, edge in edges.items()]
    )
    size, colour = (
        MEASURES[name].class_of(MEASURES[name].of(images / 255), torch.tensor([edge]))
        for name, edge in edges.items()
    )

    def labels():
        (batch,) = everything(files(tmp_path / "d", measures=BOTH, num_classes=[2, 2]))
        return reward.label_of(batch)

    assert torch.equal(labels(), torch.stack([size, colour], 1))
    table(tmp_path / "d", "col_score", [4.9, 5.0, 5.1, 6])
    assert torch.equal(labels(), torch.stack([size, torch.tensor([0, 1, 1, 1])], 1))
    table(tmp_path / "d", "label,col_score", ["0;0,9", "1;0,9", "0;1,9", "1;1,9"])
    assert labels().tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]


def test_a_copy_has_the_same_content_and_another_prompt_label_or_size_has_not(tmp_path):
    folder = paint(tmp_path / "d", "a.png", "b.png")
    table = folder / "metadata.csv"
    table.write_text("file_name,label,text\na.png,0,cat\nb.png,1,dog\n")
    seen = [files(folder).content(), files(folder, side=8).content()]
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "a.png", (0, 0))
    assert files(tmp_path / "copy").content() == seen[0]
    for cells in ("a.png,1,cat\nb.png,1,dog", "a.png,0,cat\nb.png,1,cat"):
        table.write_text(f"file_name,label,text\n{cells}\n")
        seen.append(files(folder).content())
    Image.new("RGB", (90, 90)).save(folder / "b.png")
    seen.append(files(folder).content())
    assert len(set(seen)) == 5


def test_the_fingerprint_follows_pictures_and_labels(tmp_path):
    folder = paint(tmp_path / "d", "a.png", "b.png")
    (folder / "metadata.csv").write_text("file_name,label\na.png,0\nb.png,1\n")
    seen = [files(folder).fingerprint(), files(folder, side=8).fingerprint()]
    (folder / "metadata.csv").write_text("file_name,label\na.png,1\nb.png,1\n")
    seen.append(files(folder).fingerprint())
    Image.new("RGB", (9, 9)).save(folder / "b.png")
    seen.append(files(folder).fingerprint())
    assert len(set(seen)) == 4
    assert files(folder).fingerprint() == seen[-1]
