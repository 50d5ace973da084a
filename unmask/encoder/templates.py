"""Chat templates: what a decoder was taught to see around a user's words. Data in `templates.toml`, or in the model."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from unmask.checkpoint.resolve import published_name
from unmask.errors import CheckpointError


@dataclass(frozen=True)
class Template:
    """Attributes:
    prefix, suffix: put around "instruction text"; special tokens in them count as such.
    closes: nothing may follow the suffix.
    eos: what the reference appends for `eos_token` pooling, where it differs from the family's.
    """

    prefix: str = ""
    suffix: str = ""
    closes: bool = False
    eos: str | None = None


def template_for(trained_as: str, encoder_config: Mapping[str, Any]) -> Template:
    """Return the template a model carries in its own `llm2vec_config.json` ("template"), or the one of its decoder.

    Args:
        trained_as: hub name of the decoder, or its path, which may lie in a mirror or cache of the hub.
        encoder_config: `llm2vec_config.json`.

    Raises:
        CheckpointError: the model carries one that is not made of the fields above.
    """
    carried = encoder_config.get("template")
    if carried is None:
        table = tomllib.loads(files("unmask.encoder").joinpath("templates.toml").read_text(encoding="utf-8"))
        carried = table.get(trained_as) or table.get(published_name(Path(trained_as)), {})
    try:
        return Template(**carried)
    except TypeError as error:
        raise CheckpointError(f"llm2vec_config.json carries a template with unknown fields: {error}") from error
