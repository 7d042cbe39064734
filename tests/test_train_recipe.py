"""The page about recipes says what the code does."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT
from helpers.commands import ROOT

from ercbatch.errors import UsageError
from ercbatch.prompts.tree import Window
from train.datasets import read_dataset
from train.recipe import _RANGES, Recipe, read_recipe, recipe_from
from train.sources import Source

PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
KINDS: tuple[Any, ...] = (Recipe, Source, Window)


def rows(kind: Any) -> list[tuple[str, str, str]]:
    """(key, default, meaning) in the tables of the page about one kind of TOML table."""
    result = []
    for section in PAGE.split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        about = Source if "[[train]]" in heading else Window if "[window]" in heading else Recipe
        if about is kind:
            result += re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section, re.MULTILINE)
    return result


def recipe(kind: Any, **keys: Any) -> Recipe:
    """The shortest recipe, with more keys in the table that they belong to."""
    source = {"path": "x", "labels": "meld", **(keys if kind is Source else {})}
    window = keys if kind is Window else {}
    values = {"base": "x", "train": [source], "window": window, **(keys if kind is Recipe else {})}
    return recipe_from(Path("recipe.toml"), values)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_in_the_reference_with_its_default(kind: Any) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert sorted(key for key, *_ in rows(kind)) == sorted(fields)
    for key, default, meaning in rows(kind):
        field = fields[key]
        required = field.default is field.default_factory is dataclasses.MISSING
        assert (default == "required") == required, key
        assert (default == "not set") == (field.default is None), key
        if default not in ("required", "not set"):
            value = tomllib.loads(f"value = {default.strip('`')}")["value"]
            assert recipe(kind, **{key: value}) == recipe(kind), key
        if kind is Recipe:
            assert all(f"`{i}`" in meaning for i, keys in _RANGES.items() if key in keys), key


def test_the_example_of_the_reference_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "recipe.toml"
    path.write_text(example, encoding="utf-8")
    read = read_recipe(path)
    for source in (*read.train, *read.valid):
        assert Path(source.path).parent == tmp_path
        Path(source.path).write_bytes(CHAT.read_bytes())
        assert read_dataset(source).has_targets
    (answer,) = re.findall(r"^Error: recipe.toml: (.*)$", PAGE, re.MULTILINE)
    with pytest.raises(UsageError, match=re.escape(answer)):
        read_recipe(path, ["epoch=3"])
