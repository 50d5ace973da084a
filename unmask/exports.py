"""Exports of a package, imported at first use: torch and SQLAlchemy take seconds, and `--help` needs neither."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def lazy_exports(package: str, names_by_module: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Return a `__getattr__` for the `__init__.py` of a package (PEP 562).

    Args:
        package: name of the package.
        names_by_module: for each module of the package, by its name in there, the names to export.
    """
    modules = {name: f"{package}.{module}" for module, names in names_by_module.items() for name in names}

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with _without_garbage_search():
            return getattr(import_module(modules[name]), name)

    return import_name


@contextmanager
def _without_garbage_search() -> Iterator[None]:
    """Turn the garbage collector off for an import. It would find nothing, and takes 0.2 s while torch is imported."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
