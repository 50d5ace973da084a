"""The shape of the package: rooms import only from rooms above them, and the command line starts at once."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import unmask

# Top to bottom, as in docs/architecture.md. A room may import from those before it.
ROOMS = (
    "checkpoint",
    "encoder",
    "evaluate",
    "recipe",
    "engine",
    "storage",
    "accounts",
    "catalogue",
    "onboarding",
    "router",
    "api",
    "web",
    "server",
    "cli",
)
OPEN_TO_ALL = ("errors", "home", "__init__")
PACKAGE = Path(unmask.__file__).parent


def imported(file: Path) -> set[str]:
    """Rooms that a module imports from, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unmask."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("unmask."))
    return names


def test_rooms_import_upwards_only() -> None:
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in (*OPEN_TO_ALL, "__main__"):
            continue
        assert room in ROOMS, f"{file} is in no room of docs/architecture.md"
        allowed = {*ROOMS[: ROOMS.index(room) + 1], *OPEN_TO_ALL}
        assert imported(file) <= allowed, f"{file} imports from {imported(file) - allowed}"


def test_the_picture_names_every_room() -> None:
    picture = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in ROOMS:
        assert f"  {room}" in picture


def test_exports() -> None:
    assert set(unmask.__all__) == {"Encoder", "UnmaskError", "__version__"}
    for name in unmask.__all__:
        assert getattr(unmask, name) is not None


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    script = "import sys; from unmask.cli import app; app(['--help'], exit_on_error=False); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "encode" in done.stdout
    heavy = [
        name
        for name in ("torch", "numpy", "transformers", "starlette", "pyarrow", "mteb", "sqlalchemy")
        if f"'{name}'" in done.stdout
    ]
    assert not heavy
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "unmask", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    # The best of five: what is asked of the program, not of whatever else the machine is doing.
    assert min(seconds) < 0.5
