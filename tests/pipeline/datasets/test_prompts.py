"""Recipes of prompts: the same table on any machine, every prompt once, combinations held out, mistakes in one line."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

from pipeline.datasets import prompts
from pipeline.datasets.prompts import Recipe, RecipeError, as_parquet, draw_prompts, make_table, normalised, summary
from pipeline.tables.worklist import RowRules, candidates
from pyramid_flow import Checkpoint

FIRST_FOUR = ["one green square", "one large blue triangle", "one small green triangle", "a blue cross on sand"]
FIRST_KEYS = (2485220250, "f31ea8094050f873bb7eed2a41af14dd")

SCENES = {
    "templates": ["a {colour} {shape} on {ground}", {"text": "one {size} {colour} {shape}", "weight": 2}],
    "values": {
        "colour": ["red", "green", {"value": "blue", "weight": 3}],
        "shape": ["circle", "square", "cross", "triangle"],
        "size": ["small", "large", ""],
        "ground": ["grass", "sand"],
    },
    "count": 30,
}


def recipe(**values: object) -> Recipe:
    return Recipe.model_validate({**SCENES, **values})


def numbered(count: int, **values: object) -> Recipe:
    """Return a recipe with more combinations than are listed."""
    words = {name: [f"{name}{i}" for i in range(40)] for name in ("x", "y", "z")}
    return Recipe.model_validate({"templates": ["{x} {y} {z}"], "values": words, "count": count, **values})


def splits(table: pa.Table) -> dict[str, list[dict[str, object]]]:
    rows = table.to_pylist()
    return {split: [row for row in rows if row["split"] == split] for split in ("train", "held_out")}


def test_a_recipe_makes_the_same_table_in_another_process(tmp_path):
    made = (recipe(seed=3, held_out=0.2, fields={"num_frames": [9, 17]}), numbered(50))
    files = [tmp_path / "listed.yaml", tmp_path / "drawn.yaml"]
    for file, each in zip(files, made, strict=True):
        file.write_text(yaml.safe_dump(each.model_dump(mode="json"), sort_keys=False))
    code = (
        "import sys, hashlib; from pathlib import Path\n"
        "from pipeline.datasets.prompts import Recipe, as_parquet, make_table\n"
        "for file in sys.argv[1:]:"
        " print(hashlib.sha256(as_parquet(make_table(Recipe.read(Path(file))))).hexdigest())"
    )
    command = [sys.executable, "-c", code, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout.split() == [hashlib.sha256(as_parquet(make_table(each))).hexdigest() for each in made]


def test_what_is_drawn_does_not_change_with_versions():
    assert [prompt.text for prompt in draw_prompts(recipe(count=4))] == FIRST_FOUR
    [row] = make_table(recipe(count=1)).to_pylist()
    assert (row["seed"], row["group"]) == FIRST_KEYS


def test_another_seed_draws_other_prompts_and_a_greater_count_goes_on():
    first, more, other = (draw_prompts(numbered(20 + extra, seed=seed)) for seed, extra in ((0, 0), (0, 30), (1, 0)))
    assert more[:20] == first
    assert first != other


@pytest.mark.parametrize("made", [recipe(), numbered(200)])
def test_every_prompt_is_there_once(made):
    table = make_table(made)
    assert len(table) == made.count == pc.count_distinct(table["group"]).as_py()
    assert len({normalised(text) for text in table["prompt"].to_pylist()}) == made.count


def test_all_combinations_are_written_if_there_are_fewer_than_asked_for():
    made = recipe(count=1000)
    table = make_table(made)
    assert made.num_combinations == len(table) == 3 * 4 * 2 + 3 * 3 * 4
    assert summary(made, table)[1] == "count 1000 is more than there are: the table holds all 60 different prompts"


def test_prompts_that_differ_in_case_and_spaces_only_are_one():
    same = {"templates": ["A {x} fox", "a  {x} FOX "], "values": {"x": ["red", ""]}, "count": 9}
    found = [prompt.text for prompt in draw_prompts(Recipe.model_validate(same))]
    assert sorted(text.lower() for text in found) == ["a fox", "a red fox"]
    assert all(text == " ".join(text.split()) for text in found)


def test_a_prompt_without_words_is_left_out():
    made = Recipe.model_validate({"templates": ["{x}"], "values": {"x": ["", "fox"]}, "count": 2})
    assert [prompt.text for prompt in draw_prompts(made)] == ["fox"]


@pytest.mark.parametrize("listed", [True, False])
def test_weights_are_shares_of_what_is_drawn(listed, monkeypatch):
    monkeypatch.setattr(prompts, "LISTED", 10**6 if listed else 0)
    values = {"x": [{"value": "often", "weight": 8}, "seldom"], "y": [str(number) for number in range(2000)]}
    made = Recipe.model_validate({"templates": ["{x} {y}"], "values": values, "count": 300})
    assert made.is_listed is listed
    often = sum(prompt.values["x"] == "often" for prompt in draw_prompts(made))
    assert 0.82 < often / 300 < 0.95


def test_prompts_too_rare_to_be_drawn_are_said_to_lack(monkeypatch):
    monkeypatch.setattr(prompts, "LISTED", 0)
    values = {"x": [{"value": "often", "weight": 1e6}, *(f"rare{number}" for number in range(9))]}
    made = Recipe.model_validate({"templates": ["{x}"], "values": values, "count": 3})
    table = make_table(made)
    assert len(table) == 1
    assert summary(made, table)[1].startswith("count 3 was not reached in 300 draws")


def test_combinations_are_held_out():
    pair = {"colour": "red", "shape": "cross"}
    parts = splits(make_table(recipe(count=60, held_out=[pair, {"size": "large"}])))
    assert parts["train"]
    assert parts["held_out"]
    for split, rows in parts.items():
        for row in rows:
            shown = row["size"] == "large" or all(row[name] == word for name, word in pair.items())
            assert shown == (split == "held_out")


def test_a_share_of_the_combinations_that_all_templates_show_is_held_out():
    parts = splits(make_table(recipe(count=60, held_out=0.4)))
    pairs = {split: {(row["colour"], row["shape"]) for row in rows} for split, rows in parts.items()}
    assert not pairs["train"] & pairs["held_out"]
    assert 1 <= len(pairs["held_out"]) <= 9
    assert len(pairs["train"] | pairs["held_out"]) == 12


def test_a_greater_share_holds_out_the_same_and_more_whatever_the_seed():
    few, many = (
        {tuple(row["prompt"].split()) for row in splits(make_table(recipe(count=60, held_out=share, seed=seed)))[split]}
        for share, seed, split in ((0.2, 0, "held_out"), (0.6, 5, "held_out"))
    )
    assert few
    assert few < many


def test_a_share_may_be_of_named_values():
    parts = splits(make_table(recipe(count=60, held_out={"share": 0.5, "of": ["size"]})))
    assert not {row["size"] for row in parts["held_out"]} & {row["size"] for row in parts["train"]}
    assert all(row["size"] is not None for row in parts["held_out"])


def test_the_share_of_many_combinations_is_about_right():
    table = make_table(numbered(2000, held_out=0.1))
    assert 150 < len(splits(table)["held_out"]) < 250


def test_the_table_has_a_column_for_everything():
    made = recipe(seeds_per_prompt=3, fields={"num_frames": 9, "guided_share": [[1, 0.5, 0.5]]})
    table = make_table(made)
    assert table.column_names == [
        *("prompt", "seed", "num_frames", "guided_share", "template"),
        *("colour", "shape", "size", "ground", "split", "group"),
    ]
    assert len(table) == 3 * made.count
    first = table.slice(0, 3).to_pylist()
    assert len({row["prompt"] for row in first}) == len({row["group"] for row in first}) == 1
    assert len({row["seed"] for row in first}) == 3
    for row in table.to_pylist():
        used = {name: row[name] for name in made.values if row[name] is not None}
        assert " ".join(row["template"].format_map(used).split()) == row["prompt"]
        assert (row["num_frames"], row["guided_share"]) == (9, [1, 0.5, 0.5])


def test_each_prompt_draws_one_option_of_a_field():
    table = make_table(recipe(seeds_per_prompt=2, fields={"quality": ["draft", "high"], "num_frames": [9, 17]}))
    drawn = {(row["prompt"], row["quality"], row["num_frames"]) for row in table.to_pylist()}
    assert len(drawn) == 30
    assert {(quality, frames) for _, quality, frames in drawn} == {(q, f) for q in ("draft", "high") for f in (9, 17)}


def test_every_row_is_a_request():
    rules = RowRules(Checkpoint.open("toy").preset)
    for row in make_table(recipe(fields={"num_frames": 9, "height": 64, "width": 64})).to_pylist():
        values = {name: row[name] for name in ("prompt", "seed", "num_frames", "height", "width")}
        [candidate] = candidates(values, "table:0", rules)
        assert candidate.row.error is None


def test_braces_of_the_text_are_doubled():
    made = Recipe.model_validate({"templates": ["{{a}} {x}"], "values": {"x": ["{y}"]}, "count": 1})
    assert [prompt.text for prompt in draw_prompts(made)] == ["{a} {y}"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": None}, "count None"),
        ({"count": 0}, "count 0: Input should be greater than or equal to 1"),
        ({"count": True}, "count True"),
        ({"coun": 3}, "coun is not known"),
        ({"templates": []}, "templates []"),
        ({"templates": ["a {colour} {nothing}"]}, "templates: {nothing} is not among the values"),
        ({"templates": ["a {colour"]}, "templates.0.text: expected '}'"),
        ({"templates": ["a {colour.x}"]}, "{colour.x} is not a plain {name}"),
        ({"templates": ["a {colour!r}"]}, "{colour} is not a plain {name}"),
        ({"templates": [3]}, "templates.0.text 3"),
        ({"templates": [{"text": "a", "weight": 0}]}, "templates.0.weight 0"),
        ({"templates": ["a {colour} {shape}"]}, "values: ground is in no template"),
        ({"values": {"colour": [True]}}, "values.colour.0.value True"),
        ({"values": {"colour": "red"}}, "values.colour 'red'"),
        ({"values": {"colour": ["\ud800"]}}, "surrogates not allowed"),
        ({"values": {"colour": ["red", " RED"]}}, "values: colour has 'red' 2 times"),
        ({"values": {"seed": ["red"]}}, "seed is a column of the table already"),
        ({"values": {"split": ["red"]}}, "split is a column of the table already"),
        ({"held_out": [{"colour": "pink"}]}, "held_out: there is no colour 'pink' among the values"),
        ({"held_out": [{"tone": "red"}]}, "held_out: there is no tone 'red' among the values"),
        ({"held_out": [{"size": "small", "ground": "sand"}]}, "no template shows ground, size together"),
        ({"held_out": [{}]}, "held_out.combinations.0 {}"),
        ({"held_out": 1.0}, "held_out.share 1.0: Input should be less than 1"),
        ({"held_out": {"share": 0.1, "of": ["size", "ground"]}}, "no template shows size, ground together"),
        ({"held_out": {"share": 0.1, "off": ["size"]}}, "held_out.off is not known"),
        ({"fields": {"heigth": 64}}, "fields: heigth is no field that can be set"),
        ({"fields": {"seed": 1}}, "fields: seed is no field that can be set"),
        ({"fields": {"height": [64, 100]}}, "fields: height 100 is not a multiple of 64"),
        ({"fields": {"num_inference_steps": [[1, 1, 1], 2]}}, "num_inference_steps has options of several types"),
        ({"fields": {"image": b"\x89PNG"}}, "fields: image holds bytes"),
        ({"fields": {"quality": []}}, "fields.quality []"),
    ],
)
def test_a_wrong_recipe_is_one_line(values, words, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**SCENES, **values}))
    with pytest.raises(RecipeError) as caught:
        Recipe.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("x: [", "cannot be read"), ("- a", "not a mapping"), ("", "not a mapping")]
)
def test_what_is_no_recipe_is_one_line(text, words, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=words):
        Recipe.read(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path / "absent.yaml")


def test_templates_without_a_common_value_need_a_name_for_a_share(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**SCENES, "templates": [*SCENES["templates"], "nothing"], "held_out": 0.1}))
    with pytest.raises(RecipeError, match="templates have no value in common"):
        Recipe.read(file)
