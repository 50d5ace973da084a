"""unmask: turn a decoder-only LLM into a text encoder, and serve its vectors.

>>> from unmask import Encoder
>>> encoder = Encoder.load("unmask/smollm2-embed-6l")
>>> encoder.encode(["a text", "another"]).shape
(2, 576)

The names in `__all__` are the public Python API, together with the public methods and attributes of these classes.
Every other module may change in any release.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Encoder", "Recipe", "UnmaskError", "__version__", "errors", "evaluate", "train"]

if TYPE_CHECKING:
    from unmask import errors
    from unmask.encoder import Encoder
    from unmask.errors import UnmaskError
    from unmask.evaluate import evaluate
    from unmask.training.recipe import Recipe
    from unmask.training.train import TrainingResult

# Imported at first use: torch takes seconds, and `unmask --help` must not pay for it.
_LAZY_NAMES = {"Encoder": "unmask.encoder", "Recipe": "unmask.training.recipe", "UnmaskError": "unmask.errors"}
_LAZY_MODULES = ("errors", "evaluate")  # the package `evaluate` can be called


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(_LAZY_NAMES[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"unmask.{name}")
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")


def train(
    recipe: "Recipe | str | Path", *, output: str | Path, data: str | Path | None = None, resume: bool = False
) -> "TrainingResult":
    """Train an encoder from a decoder.

    Args:
        recipe: a `Recipe`, or the path of a TOML file with one.
        output: folder of the run: checkpoints, metrics, and at the end the adapter or model.
        data: folder that the recipe's paths are taken from. Default: the folder of the TOML file, else the current one.
        resume: continue the run that is in the output folder.

    Raises:
        UsageError: the recipe and the data do not fit, or `output` holds another run.
        TrainingError, StorageError: the run cannot go on.
    """
    from unmask.training.recipe_file import read_recipe
    from unmask.training.train import run_training

    folder = Path()
    if isinstance(recipe, (str, Path)):
        folder, recipe = Path(recipe).parent, read_recipe(Path(recipe))
    return run_training(recipe, data=folder if data is None else Path(data), output=Path(output), resume=resume)
