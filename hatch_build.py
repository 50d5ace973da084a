"""Build hook: a wheel carries the compiled kernels, or is a pure one where there is no C compiler."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_BUILD = Path("unmask", "encoder", "runtime", "kernels", "build.py")


class KernelsBuildHook(BuildHookInterface):
    """Compiles `kernels.c` for every kind of processor of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries to the wheel. An editable install compiles at the first use instead."""
        if version == "editable":
            return
        spec = importlib.util.spec_from_file_location("build_kernels", Path(self.root) / _BUILD)
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        targets = build.targets() if build.compiler() else []
        if not targets:
            self.app.display_warning("no C compiler: the wheel has no compiled kernels, and encodes on torch")
            return
        for target in targets:
            path = build.compile_library(target, Path(self.root) / _BUILD.parent)
            build_data["force_include"][str(path)] = str(_BUILD.parent / path.name)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
