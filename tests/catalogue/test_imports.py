"""The catalogue is light: pages, router and commands read it without the code that runs models."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "mteb", "unmask.encoder", "unmask.engine", "unmask.evaluate", "unmask.onboarding")


def test_importing_the_catalogue_loads_no_encoder() -> None:
    script = (
        "import importlib, pkgutil, sys, unmask.catalogue\n"
        "for module in pkgutil.iter_modules(unmask.catalogue.__path__, 'unmask.catalogue.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    modules = set(printed.split())
    assert "unmask.catalogue.store" in modules
    assert not modules.intersection(HEAVY)
