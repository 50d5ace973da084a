"""Train in several stages from one TOML file: each starts from the model that the stage before it has written.

A file with stages is a recipe whose `[[stages]]` tables say what differs: a key of a stage replaces the file's, a table
is merged key by key, and a list is replaced whole. Each stage is a run of its own, in a folder of its name.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from unmask.errors import UsageError
from unmask.training.recipe import Recipe
from unmask.training.recipe_file import STAGES, read_toml, recipe_of_table
from unmask.training.run_folder import RunFolder


def read_stages(path: Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """Read the recipes of all stages, in order; a file without stages is one.

    Args:
        overrides: `key.path=value` for every stage; `stages.NAME.key=value` for one.

    Raises:
        UsageError: as `read_recipe`, or a stage has no name, or one that is taken.
    """
    table = read_toml(path)
    stages = table.pop(STAGES, None)
    if stages is None:
        return [recipe_of_table(table, str(path), overrides)]
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name or Path(name).name != name or names.index(name) != number:
            raise UsageError(f"{path}: stage {number + 1} has the name {name!r}; give each stage a name of its own")
    unknown = next(
        (text for text in overrides if text.startswith(f"{STAGES}.") and text.split(".")[1] not in names), None
    )
    if unknown is not None:
        raise UsageError(f"--set {unknown}: the stages of {path} are {', '.join(map(str, names))}")
    recipes = []
    for name, stage in zip(names, stages, strict=True):
        prefix = f"{STAGES}.{name}."
        own = [text for text in overrides if not text.startswith(f"{STAGES}.")]
        own += [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
        recipes.append(recipe_of_table(merge_tables(table, stage), f"{path}, stage {name}", own))
    return recipes


def merge_tables(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with another one's keys over its own, tables within it key by key.

    >>> merge_tables({"steps": 5, "optimiser": {"lr": 1, "clip": 2}}, {"optimiser": {"lr": 3}})
    {'steps': 5, 'optimiser': {'lr': 3, 'clip': 2}}
    """
    result = copy.deepcopy(dict(table))
    for key, value in changes.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            result[key] = merge_tables(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def train_stages(
    recipes: Sequence[Recipe], output: Path, resume: bool, run: Callable[[Recipe, Path, bool], Path]
) -> list[Path]:
    """Train one stage after the other, each on what the one before it has written.

    Args:
        recipes: in order. The `base` of the first is the decoder; those of the others are not read.
        output: gets a folder for each stage, by its name.
        resume: continue with the first stage that has not ended.
        run: trains a recipe into a folder, resuming or not, and returns the result's folder.

    Returns:
        The results, in order.
    """
    results: list[Path] = []
    for number, recipe in enumerate(recipes):
        if results:
            # The base has lost its layers and its adapters are merged by its own name.
            recipe = msgspec.structs.replace(recipe, base=str(results[-1]), layers=None, adapters=[])
        folder = output / f"{number + 1}-{recipe.name}"
        ended = result_of(folder, recipe) if resume else None
        begun = resume and (folder / "run.json").is_file()
        results.append(ended or run(recipe, folder, begun))
    return results


def result_of(folder: Path, recipe: Recipe) -> Path | None:
    """Return the folder that a finished run has written; None while it has not ended."""
    result = folder / ("adapter" if recipe.lora is not None else "model")
    if not result.is_dir():
        return None
    best = folder / "best"
    return best if best.is_dir() and RunFolder(folder, recipe.keep).metrics() else result
