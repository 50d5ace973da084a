"""Recipe keys that have been renamed. A recipe with an old key is read until the next release, with a warning."""

import warnings
from typing import Any

from unmask.errors import UsageError

# Old name -> new name, by the table of the recipe that holds the key; "" is the recipe itself.
RENAMED_KEYS = {
    "": {"held_apart": "decontaminate_against", "epochs_at_most": "max_epochs"},
    "lora": {"start": "init_from"},
    "data": {"contrast": "use_labels", "distil": "use_teacher"},
}


def rename_keys(recipe: dict[str, Any], *, origin: str = "", replace: bool = False) -> None:
    """Give the renamed keys of a recipe their new names, in place.

    Args:
        recipe: as TOML or JSON gives it.
        origin: where the recipe was read, for the warning. Empty for a stored recipe, which nobody edits: no warning.
        replace: an old key replaces the value of the new one. An override with an old key comes later than the file.

    Raises:
        UsageError: a key is there under its old and its new name.
    """
    for table, keys in RENAMED_KEYS.items():
        content = recipe if not table else recipe.get(table)
        for entry in content if isinstance(content, list) else [content]:
            if not isinstance(entry, dict):
                continue  # the types are checked later, with a message that names the field
            prefix = f"{table}." if table else ""
            for old, new in keys.items():
                if old not in entry:
                    continue
                if new in entry and not replace:
                    raise UsageError(
                        f"{origin or 'run.json'}: {prefix}{old} is the old name of {prefix}{new}, and both are there; "
                        f"remove {prefix}{old}"
                    )
                if origin:
                    warnings.warn(
                        f"{origin}: {prefix}{old} is now called {prefix}{new}. The old name is read until the next "
                        "release; rename it",
                        FutureWarning,
                        stacklevel=3,
                    )
                entry[new] = entry.pop(old)
