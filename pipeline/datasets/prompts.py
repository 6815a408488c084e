"""Recipes of prompts: templates and values become a table of requests, the same one on any machine, in two splits."""

import hashlib
import io
import json
import unicodedata
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from pathlib import Path
from random import Random
from string import Formatter
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.request import MAX_COPIES, RenderRequest, derived_seed, hash_of
from pyramid_flow.errors import PyramidFlowError

OWN_COLUMNS = ("prompt", "seed", "template", "split", "group")
FIXED = ("prompt", "id", "seed", "num_videos_per_prompt")
"""Fields of a request that a recipe decides itself."""

LISTED = 10_000
"""So many combinations, or twice what is asked for, are listed; of more some are drawn."""
DRAWS_PER_PROMPT = 100
MAX_SHOWN = 80

Weight = Annotated[float, Field(gt=0, le=1e6)]
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
"""Text that can be stored: YAML can hold halves of characters."""


class RecipeError(PyramidFlowError, ValueError):
    """A recipe breaks a rule; the message names the field and the rule."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Template(_Part):
    """A text with {names} of values; weight: its share of the prompts, relative to the other templates."""

    text: Text = Field(min_length=1)
    weight: Weight = 1

    @field_validator("text")
    @classmethod
    def _plain_names(cls, value: str) -> str:
        for _, name, spec, conversion in Formatter().parse(value):
            if name is not None and (spec or conversion or not name.isidentifier()):
                raise ValueError(f"{{{name}}} is not a plain {{name}}; braces of the text itself are doubled")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values in the text, each once."""
        return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.text) if name is not None))


class Value(_Part):
    """A word or phrase in place of a name; weight: how often, relative to the other values of that name."""

    value: Text
    weight: Weight = 1


class HeldOut(_Part):
    """Which prompts make up the split held_out: those that show one of some combinations of values.

    combinations: values by name; share: of all combinations of the values `of` (default: of those that every template
    shows), chosen by a hash of the combination alone: with any seed, and with any greater share, it is held out, too.
    A prompt that does not show all of them is not.
    """

    combinations: tuple[Annotated[dict[str, str], Field(min_length=1)], ...] = ()
    share: Annotated[float, Field(ge=0, lt=1)] = 0
    of: tuple[str, ...] = ()

    def takes(self, values: Mapping[str, str]) -> bool:
        """Tell whether a prompt with these values is held out."""
        if any(combination.items() <= values.items() for combination in self.combinations):
            return True
        shown = {name: normalised(values[name]) for name in self.of if name in values}
        return len(shown) == len(self.of) and _unit(json.dumps(shown, sort_keys=True)) < self.share


def _held_out(given: object) -> object:
    if isinstance(given, list):
        return {"combinations": given}
    return {"share": given} if isinstance(given, int | float) else given


def _options(given: object) -> object:
    return given if isinstance(given, list) else [given]


def _named(key: str) -> BeforeValidator:
    """Take a bare value for a mapping with only that key."""
    return BeforeValidator(lambda given: given if isinstance(given, dict) else {key: given})


class Recipe(_Part):
    """What a table of prompts is made of.

    count: number of different prompts, of both splits; seeds_per_prompt: videos of each; seed: of all that is drawn;
    fields: values of a request's fields, or lists of which each prompt draws one.
    """

    templates: tuple[Annotated[Template, _named("text")], ...] = Field(min_length=1)
    values: dict[str, Annotated[tuple[Annotated[Value, _named("value")], ...], Field(min_length=1)]] = {}
    count: Annotated[int, Field(ge=1, strict=True)]
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    seeds_per_prompt: Annotated[int, Field(ge=1, le=MAX_COPIES, strict=True)] = 1
    held_out: Annotated[HeldOut, BeforeValidator(_held_out)] = HeldOut()
    fields: dict[str, Annotated[tuple[Any, ...], BeforeValidator(_options), Field(min_length=1)]] = {}

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a YAML file; raises RecipeError."""
        try:
            given = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise RecipeError(f"{path} is not a mapping")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise RecipeError(f"{path}: {_first_message(error)}") from error

    @field_validator("values")
    @classmethod
    def _distinct(cls, value: dict[str, tuple[Value, ...]]) -> dict[str, tuple[Value, ...]]:
        for name, options in value.items():
            if name in (*RenderRequest.model_fields, *OWN_COLUMNS):
                raise ValueError(f"{name} is a column of the table already: choose another name")
            [(word, times)] = Counter(normalised(option.value) for option in options).most_common(1)
            if times > 1:
                raise ValueError(f"{name} has {word!r} {times} times: give it a weight")
        return value

    @field_validator("fields")
    @classmethod
    def _requested(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for name, options in value.items():
            check_field(name, options)
        return value

    @model_validator(mode="after")
    def _known_names(self) -> "Recipe":
        shown = [template.names for template in self.templates]
        for name in (name for names in shown for name in names):
            if name not in self.values:
                raise ValueError(f"templates: {{{name}}} is not among the values, which are {', '.join(self.values)}")
        if unused := sorted(set(self.values).difference(*shown)):
            raise ValueError(f"values: {unused[0]} is in no template")
        for combination in self.held_out.combinations:
            for name, word in combination.items():
                if word not in [option.value for option in self.values.get(name, ())]:
                    raise ValueError(f"held_out: there is no {name} {word!r} among the values")
            if not any(combination.keys() <= set(names) for names in shown):
                raise ValueError(f"held_out: no template shows {', '.join(combination)} together")
        if self.held_out.share and not any(set(self.combined) <= set(names) for names in shown):
            raise ValueError(f"held_out: no template shows {', '.join(self.combined)} together")
        if self.held_out.share and not self.combined:
            raise ValueError("held_out: templates have no value in common, `of` must name what makes a combination")
        return self

    @property
    def combined(self) -> tuple[str, ...]:
        """Names of the values that make a combination of which a share is held out."""
        common = set(self.values).intersection(*(template.names for template in self.templates))
        return self.held_out.of or tuple(sorted(common))

    @property
    def num_combinations(self) -> int:
        """Number of ways to fill all templates, an upper bound of the number of different prompts."""
        return sum(prod(len(self.values[name]) for name in template.names) for template in self.templates)

    @property
    def is_listed(self) -> bool:
        """Whether all combinations are looked at."""
        return self.num_combinations <= max(LISTED, 2 * self.count)


@dataclass(frozen=True)
class Prompt:
    """A template with its values."""

    template: str
    values: Mapping[str, str]

    @property
    def text(self) -> str:
        """What is shown, with single spaces: a value may be empty."""
        return " ".join(self.template.format_map(self.values).split())

    @property
    def group(self) -> str:
        """32 hex digits, equal for prompts that differ in case and spaces only."""
        return hash_of({"prompt": normalised(self.text)})


def normalised(text: str) -> str:
    """Return a text without differences of case, spaces and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_field(name: str, options: Sequence[object]) -> None:
    """Raise ValueError unless all options are values that a request's field can have, and of one type."""
    if name in FIXED or name not in RenderRequest.model_fields:
        known = (field for field in RenderRequest.model_fields if field not in FIXED)
        raise ValueError(f"{name} is no field that can be set, these are: {', '.join(known)}")
    for option in options:
        if isinstance(option, bytes):
            raise ValueError(f"{name} holds bytes: give the URI of a file")
        RenderRequest.parse({"prompt": "any", name: option})
    try:
        pa.array(options)
    except pa.ArrowException as error:
        raise ValueError(f"{name} has options of several types: {list(options)}") from error


def draw_prompts(recipe: Recipe) -> list[Prompt]:
    """Return different prompts in the order they are drawn, by weight: as many as asked for, or as there are."""
    rng = Random(recipe.seed)
    found: dict[str, Prompt] = {}
    for prompt in _all(recipe, rng) if recipe.is_listed else _some(recipe, rng):
        if prompt.text:
            found.setdefault(normalised(prompt.text), prompt)
        if len(found) == recipe.count:
            break
    return list(found.values())


def make_table(recipe: Recipe) -> pa.Table:
    """Return the table: a row per prompt and seed."""
    held_out = recipe.held_out.model_copy(update={"of": recipe.combined})
    rows = []
    for prompt in draw_prompts(recipe):
        key = f"{recipe.seed} {prompt.group}"
        row = {
            "prompt": prompt.text,
            **{name: options[int(_unit(f"{key} {name}") * len(options))] for name, options in recipe.fields.items()},
            "template": prompt.template,
            **prompt.values,
            "split": "held_out" if held_out.takes(prompt.values) else "train",
            "group": prompt.group,
        }
        rows += [{**row, "seed": derived_seed(key) + number} for number in range(recipe.seeds_per_prompt)]
    return pa.Table.from_pylist(rows, _schema(recipe))


def as_parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file; the same version of pyarrow gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def summary(recipe: Recipe, table: pa.Table) -> list[str]:
    """Say in lines what a table holds, and what it lacks."""
    prompts = pc.count_distinct(table["group"]).as_py()
    parts = pc.value_counts(table["split"]).to_pylist()
    splits = ", ".join(f"{part['counts']} {part['values']}" for part in parts)
    lines = [f"{prompts} different prompts of {recipe.num_combinations} combinations, {len(table)} rows: {splits}"]
    if prompts < recipe.count and recipe.is_listed:
        lines.append(f"count {recipe.count} is more than there are: the table holds all {prompts} different prompts")
    elif prompts < recipe.count:
        draws = DRAWS_PER_PROMPT * recipe.count
        lines.append(f"count {recipe.count} was not reached in {draws} draws: weights make most prompts too rare")
    return lines


def _schema(recipe: Recipe) -> pa.Schema:
    text = pa.string()
    return pa.schema(
        [
            ("prompt", text),
            ("seed", pa.int64()),
            *((name, pa.array(options).type) for name, options in recipe.fields.items()),
            ("template", text),
            *((name, text) for name in recipe.values),
            ("split", text),
            ("group", text),
        ]
    )


def _all(recipe: Recipe, rng: Random) -> Iterator[Prompt]:
    """Yield every combination once, the weighty ones sooner: as by drawing without putting back."""
    rest = list(_combinations(recipe))
    while rest:
        cumulative = list(accumulate(weight for weight, _ in rest))
        drawn = dict.fromkeys(_pick(rng, cumulative) for _ in rest)  # what was drawn before does not count again
        yield from (rest[index][1] for index in drawn)
        rest = [combination for index, combination in enumerate(rest) if index not in drawn]


def _some(recipe: Recipe, rng: Random) -> Iterator[Prompt]:
    """Yield combinations by weight, with repetitions."""
    templates = list(accumulate(template.weight for template in recipe.templates))
    words = {name: list(accumulate(option.weight for option in options)) for name, options in recipe.values.items()}
    for _ in range(DRAWS_PER_PROMPT * recipe.count):
        template = recipe.templates[_pick(rng, templates)]
        chosen = {name: recipe.values[name][_pick(rng, words[name])].value for name in template.names}
        yield Prompt(template.text, chosen)


def _combinations(recipe: Recipe) -> Iterator[tuple[float, Prompt]]:
    """Yield every combination with its weight; those of a template have the template's weight together."""
    totals = {name: sum(option.weight for option in options) for name, options in recipe.values.items()}
    for template in recipe.templates:
        for options in product(*(recipe.values[name] for name in template.names)):
            chosen = dict(zip(template.names, options, strict=True))
            weight = template.weight * prod(option.weight / totals[name] for name, option in chosen.items())
            yield weight, Prompt(template.text, {name: option.value for name, option in chosen.items()})


def _pick(rng: Random, cumulative: Sequence[float]) -> int:
    # not rng.choices(): of a generator only random() is promised to stay the same in later versions of Python
    return bisect(cumulative, rng.random() * cumulative[-1], hi=len(cumulative) - 1)


def _unit(text: str) -> float:
    """Return a number from 0 on and below 1 that depends on the text only."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def _first_message(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == "extra_forbidden":
        return f"{name} is not known"
    if first["type"] == "value_error":
        return f"{name}: {message}" if name else message
    shown = repr(first["input"])
    return f"{name} {shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + '...'}: {message}"
