"""Let an early exit take its layers from the deeper model of the same run, so that their weights ship once.

    cp -r RUN/best RUN/deep
    cp -r RUN/best-6-layers RUN/shallow
    python tools/share_layers.py RUN/shallow RUN/deep

The exit's folder loses its weights and names the other one, which lies beside it, in its `config.json`. Nothing is
changed unless each of its tensors is the deeper model's, to the bit.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from unmask.checkpoint.checkpoint import LAYERS_FROM
from unmask.disk import atomic_write
from unmask.errors import UnmaskError, UsageError

WEIGHTS = "model.safetensors"


def share_layers(exit_model: Path, deeper: Path) -> None:
    """Remove the weights of an exit's folder, and name the deeper model in its configuration.

    Raises:
        UsageError: the folders are not side by side, lack weights, or a tensor differs. Nothing was changed then.
    """
    if exit_model.resolve().parent != deeper.resolve().parent:
        raise UsageError(f"{exit_model} and {deeper} are not side by side")
    for folder in (exit_model, deeper):
        if not (folder / WEIGHTS).is_file():
            raise UsageError(f"{folder} has no {WEIGHTS}")
    own, theirs = load_file(exit_model / WEIGHTS), load_file(deeper / WEIGHTS)
    differing = [name for name, each in own.items() if name not in theirs or not torch.equal(each, theirs[name])]
    if differing:
        raise UsageError(f"{differing[0]} of {exit_model} is not that of {deeper}; they are not of one run")
    config = json.loads((exit_model / "config.json").read_text(encoding="utf-8"))
    config[LAYERS_FROM] = deeper.resolve().name
    with atomic_write(exit_model / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (exit_model / WEIGHTS).unlink()


def main() -> int:
    """Share the layers of the folders on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exit_model", type=Path, help="folder of the exit, such as RUN/shallow")
    parser.add_argument("deeper", type=Path, help="folder of the whole model, beside it")
    options = parser.parse_args()
    try:
        share_layers(options.exit_model, options.deeper)
    except UnmaskError as error:
        print(f"share_layers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
