import json

import pytest

from diffrl import config
from diffrl.envs.prompts import LabelledPrompt, load_prompts
from diffrl.errors import DiffRLError


def test_the_two_lists_have_the_published_words():
    animals = load_prompts("simple_animals")
    assert len(animals) == len(set(animals)) == 45
    assert (animals[0], animals[-1]) == ("cat", "kangaroo")
    evaluation = load_prompts("eval_animals")
    assert len(evaluation) == 8
    assert set(evaluation) - set(animals) == {"peacock", "panda"}


def test_a_file_gives_one_prompt_per_line_without_blank_ones(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a red cat\n\n  zwei Hühner \n", encoding="utf-8")
    assert load_prompts(str(path)) == ["a red cat", "zwei Hühner"]


def test_bad_files_are_named(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, words in (
        (empty, "no prompt in it"),
        (binary, "UTF-8"),
        (tmp_path / "missing.txt", "No such file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(DiffRLError, match=words):
            load_prompts(str(path))


def test_a_misspelt_list_gets_the_nearest_name():
    with pytest.raises(DiffRLError, match="Did you mean 'simple_animals'"):
        load_prompts("simple_animal")


def imagenet(names=("tench, Tinca tinca", "puffer, pufferfish, blowfish", "abacus")):
    """Classes in ImageNet's order: number 0, 397 and 398 have these names."""
    lines = [f"animal {number}, beast {number}" for number in range(1000)]
    lines[0], lines[397], lines[398] = names
    return lines


class TestImageNet:
    @pytest.mark.parametrize("prefix", ["", "n01440764 "])
    def test_lines_and_a_synset_mapping_give_first_names_or_all(self, tmp_path, prefix):
        path = tmp_path / "LOC_synset_mapping.txt"
        path.write_text("\n".join(prefix + line for line in imagenet()) + "\n\n")
        first = load_prompts(f"imagenet_animals:{path}")
        assert len(first) == 398
        assert (first[0], first[1], first[-1]) == ("tench", "animal 1", "puffer")
        full = load_prompts(f"imagenet_animals_full:{path}")
        assert len(full) == 398
        assert (full[0], full[-1]) == ("tench, Tinca tinca", "puffer, pufferfish, blowfish")

    def test_a_python_dict_of_names_is_read(self, tmp_path):
        """imagenet1000_clsidx_to_labels.txt: `{0: 'tench, Tinca tinca',`, and so on."""
        path = tmp_path / "imagenet1000_clsidx_to_labels.txt"
        path.write_text("{" + ",\n ".join(f"{n}: {name!r}" for n, name in enumerate(imagenet())) + "}")
        first = load_prompts(f"imagenet_animals:{path}")
        assert (len(first), first[0], first[-1]) == (398, "tench", "puffer")

    def test_an_index_in_json_is_sorted_by_number(self, tmp_path):
        path = tmp_path / "imagenet_class_index.json"
        names = [line.partition(",")[0].replace(" ", "_") for line in imagenet()]
        index = {str(number): [f"n{number:08}", name] for number, name in enumerate(names)}
        path.write_text(json.dumps(dict(reversed(index.items()))))
        prompts = load_prompts(f"imagenet_animals:{path}")
        assert (len(prompts), prompts[0], prompts[1], prompts[-1]) == (398, "tench", "animal 1", "puffer")

    @pytest.mark.parametrize("by_number", [True, False])
    @pytest.mark.parametrize("space", [" ", "_"])
    def test_json_may_have_the_names_alone(self, tmp_path, by_number, space):
        names = imagenet()
        names[1] = f"great{space}white{space}shark"
        content = {str(number): name for number, name in enumerate(names)} if by_number else names
        path = tmp_path / "names.json"
        path.write_text(json.dumps(content, indent=1))
        first = load_prompts(f"imagenet_animals:{path}")
        assert len(first) == 398
        assert first[:3] == ["tench", "great white shark", "animal 2"]
        full = load_prompts(f"imagenet_animals_full:{path}")
        assert len(full) == 398
        assert (full[0], full[-1]) == ("tench, Tinca tinca", "puffer, pufferfish, blowfish")

    @pytest.mark.parametrize("last", ["puffer", "pufferfish", "puffer fish, blowfish"])
    @pytest.mark.parametrize("name", ["names.json", "names.txt"])
    def test_the_last_animal_is_a_puffer_by_any_of_its_names(self, tmp_path, last, name):
        names = imagenet(("tench", last, "abacus"))
        (tmp_path / name).write_text(json.dumps(names) if name == "names.json" else "\n".join(names))
        assert load_prompts(f"imagenet_animals:{tmp_path / name}")[-1] == last.split(",")[0]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("sorted.txt", "\n".join(sorted(imagenet()))),
            ("short.txt", "\n".join(imagenet()[:397])),
            ("cut.txt", "{0: 'tench, Tinca tinca',\n 1: 'gold"),
            ("shifted.txt", "\n".join(["background", *imagenet()])),
            ("empty.json", "{}"),
            ("list.json", "[1]"),
            ("word.json", '"tench"'),
            ("number.json", "1"),
            ("sorted.json", json.dumps(sorted(imagenet()))),
            ("short.json", json.dumps(imagenet()[:397])),
            ("shifted.json", json.dumps({n + 1: name for n, name in enumerate(imagenet())})),
            ("nested.json", json.dumps({"0": {"name": "tench"}})),
            ("no_names.json", json.dumps(["tench", *[None] * 397])),
            ("whale.json", json.dumps(imagenet(("tench", "whale", "puffer")))),
            ("broken.json", "{"),
        ],
    )
    def test_another_order_or_file_is_refused(self, tmp_path, name, text):
        (tmp_path / name).write_text(text)
        with pytest.raises(DiffRLError, match=f"{name}: not ImageNet's classes .* 0 is tench"):
            load_prompts(f"imagenet_animals:{tmp_path / name}")

    def test_a_missing_file_is_named_and_the_word_passes_the_command_line(self):
        word = config.load(["prompts=imagenet_animals:/no/such.txt"]).prompts
        with pytest.raises(DiffRLError, match=r"/no/such.txt: cannot be read \(No such file"):
            load_prompts(word)


class TestLabels:
    def load(self, tmp_path, text, num_classes=(4,)):
        path = tmp_path / "my.csv"
        path.write_text(text, encoding="utf-8")
        return load_prompts(str(path), num_classes)

    def test_a_csv_gives_prompts_with_labels_where_it_has_them(self, tmp_path):
        prompts = self.load(tmp_path, 'prompt, label\ncat, 3\n"a dog, lying",0\nbee,\n')
        assert prompts == ["cat", "a dog, lying", "bee"]
        assert [getattr(prompt, "label", None) for prompt in prompts] == [(3,), (0,), None]
        assert not any(isinstance(p, LabelledPrompt) for p in self.load(tmp_path, "Prompt\ncat\n"))

    @pytest.mark.parametrize("text", ["prompt,label\ncat,1;0\n", "label2,prompt,label1\n0,cat,1\n"])
    def test_labels_of_two_attributes(self, tmp_path, text):
        assert self.load(tmp_path, text, (2, 3))[0].label == (1, 0)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("prompt,label\ncat,1\ndog,4\n", "line 3: label='4' is unknown; this reward has labels 0 to 3"),
            ("prompt,label\ncat,small\n", "line 2: label='small' is not a whole number"),
            ("word,label\ncat,1\n", "line 2: it has no 'prompt'"),
            ("cat\n", "no row in it"),
        ],
    )
    def test_a_row_that_means_nothing_is_named(self, tmp_path, text, expected):
        with pytest.raises(DiffRLError, match=rf"my\.csv.*({expected})"):
            self.load(tmp_path, text)

    def test_a_reward_without_labels_takes_none(self, tmp_path):
        with pytest.raises(DiffRLError, match="a label of this reward has 0"):
            self.load(tmp_path, "prompt,label\ncat,1\n", ())
