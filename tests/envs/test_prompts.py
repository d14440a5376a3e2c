import pytest

from diffrl.envs.prompts import load_prompts
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
