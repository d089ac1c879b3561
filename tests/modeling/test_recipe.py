"""Recipes: what TOML files and overrides may say, and the ones that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_memllm.errors import RecipeError
from edge_memllm.modeling import parameter_counts
from edge_memllm.modeling.recipe import Recipe
from edge_memllm.modeling.training import model_config
from support import ROOT

RECIPES = sorted((ROOT / "examples/recipes").glob("*.toml"))


class TestRecipe:
    def test_toml_and_overrides(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.toml"
        path.write_text('[training]\nsteps = 7\nlearning_rate = 1\n[model]\npreset = "1b"\n')
        recipe = Recipe.load(path)
        assert (recipe.training.steps, recipe.training.learning_rate) == (7, 1.0)
        recipe.override("training.save_dtype=float16")
        recipe.override("trainer.fsdp=true")
        recipe.override("data.boundary_first=true")
        assert recipe.data.boundary_first
        assert recipe.training.save_dtype == "float16"
        assert recipe.trainer == {"fsdp": True}

    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_the_shipped_recipes_are_valid(self, path: Path) -> None:
        recipe = Recipe.load(path)
        recipe.data.train = ["text.txt"]
        recipe.validate()
        model_config(recipe)

    def test_the_family_differs_in_its_networks_alone(self) -> None:
        recipes = {path.stem: Recipe.load(path) for path in RECIPES}
        del recipes["tiny-english"]
        configs = {name: model_config(recipe) for name, recipe in recipes.items()}
        counts = {name: parameter_counts(config) for name, config in configs.items()}
        for recipe in recipes.values():
            recipe.model.clear()
        assert all(recipe == recipes["family"] for recipe in recipes.values())
        for name in ("memoryllm", "flex-1", "flex-2", "flex-3"):
            assert counts[name]["total"] == pytest.approx(counts["base"]["total"], rel=0.01)
        for dense, sparse in (("base-active", "memoryllm"), ("base-active-flex-3", "flex-3")):
            active = counts[sparse]["active"]
            assert counts[dense]["active"] == pytest.approx(active, rel=0.01)
        attention, memory = counts["attention-only"], counts["memoryllm"]
        assert attention["total"] == attention["active"] == memory["active"]

    def test_include(self, tmp_path: Path) -> None:
        """What the included recipe says holds where the including one is silent."""
        (tmp_path / "shared.toml").write_text("[training]\nsteps = 7\nseed = 3\n[trainer]\na = 1\n")
        path = tmp_path / "own.toml"
        path.write_text('include = "shared.toml"\n[training]\nseed = 4\n[trainer]\nb = 2\n')
        recipe = Recipe.load(path)
        assert (recipe.training.steps, recipe.training.seed) == (7, 4)
        assert recipe.trainer == {"a": 1, "b": 2}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("include = 3", "include is 3; expected the name of a file beside it"),
            ('include = "../b.toml"', "expected the name of a file beside it"),
            ('include = "none.toml"', r"none\.toml: cannot be read"),
            ('include = "a.toml"', r"a\.toml: unknown section \[include\]"),
        ],
    )
    def test_wrong_includes(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "a.toml").write_text(content)
        with pytest.raises(RecipeError, match=message):
            Recipe.load(tmp_path / "a.toml")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[training]\nstep = 1", r"unknown key 'step'; known are steps"),
            ("[traning]\nsteps = 1", r"unknown section \[traning\]"),
            ("[training]\nsteps = true", "steps is True; expected int"),
            ("[data]\nboundary_first = 1", "boundary_first is 1; expected bool"),
            ('[data]\ntrain = "a.txt"', r"train is 'a.txt'; expected list\[str\]"),
            ("[training", "not a TOML file"),
            ("a = " + "[" * 99_999, "not a TOML file"),
            ("a = " + "9" * 9_999, "not a TOML file"),
        ],
    )
    def test_wrong_files(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "recipe.toml"
        path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            Recipe.load(path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.load(tmp_path / "none.toml")

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("training.batch_size=0", "batch_size is 0; use 1 or more"),
            ("training.steps=-1", "steps is -1"),
            ("training.precision=fp8", "precision is 'fp8'"),
            ("training.save_dtype=int8", "save_dtype is 'int8'"),
            ("training.min_learning_rate=1.0", "above learning_rate"),
            ("data.sequence_length=1", "sequence_length is 1"),
            ("training.steps=1", "train is empty"),
        ],
    )
    def test_impossible_values(self, assignment: str, message: str) -> None:
        recipe = Recipe()
        recipe.override(assignment)
        with pytest.raises(RecipeError, match=message):
            recipe.validate()

    @pytest.mark.parametrize("assignment", ["training", "training.steps", "steps=3"])
    def test_malformed_override(self, assignment: str) -> None:
        with pytest.raises(RecipeError, match=r"expected section\.key=value"):
            Recipe().override(assignment)
