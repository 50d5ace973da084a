"""The rules of the package: one meaning per name, the field's words, short functions, imports in one direction."""

import ast
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "unmask"

# Packages and top modules in the order of the picture in docs/architecture.md, which a test compares with this one.
# Each may import from those before it.
ORDER = (
    "exports",
    "errors",
    "validation",
    "home",
    "disk",
    "tables",
    "terminal",
    "checkpoint",
    "encoder",
    "conformance",
    "bulk",
    "charts",
    "evaluate",
    "training",
    "engine",
    "cluster",
    "export",
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


def words(text: str) -> set[str]:
    return set(text.split())


MAX_LINES = 60
MAX_PARAMETERS = 12

# Module names that say nothing of the content.
MODULE_NAMES = words("utils helpers common manager base")
# Names without a subject, as the name of a parameter, a variable, a field or a function.
ADJECTIVES = words("found wanted known given told kept wrong asked shown")
# First words of a docstring that make a clause out of a noun.
CLAUSE_WORDS = words("what whatever whether who whoever whom whose how where when which why")

Places = dict[str, set[str]]  # path below unmask/ -> names in it that break the rule


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package by its path below unmask/, without the migrations of the database."""
    return {
        file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
        if "versions" not in file.parts
    }


@cache
def nodes(path: str) -> tuple[ast.AST, ...]:
    """Every node of a module. One walk serves all rules."""
    return tuple(ast.walk(sources()[path]))


def module_name(path: str) -> str:
    """`encoder/__init__.py` -> `unmask.encoder`."""
    return ".".join(["unmask", *path.removesuffix(".py").split("/")]).removesuffix(".__init__")


def part_of(path: str) -> str:
    """The package or top module that a path lies in, by its name in ORDER."""
    return path.split("/")[0].removesuffix(".py")


Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def functions(path: str) -> tuple[tuple[str, Function], ...]:
    """Every function of a module with its qualified name, nested ones and methods too."""
    return tuple(_functions_in(sources()[path].body, ""))


def _functions_in(statements: Sequence[ast.AST], prefix: str) -> Iterator[tuple[str, Function]]:
    for node in statements:
        if isinstance(node, ast.expr):
            continue  # it holds no definition
        inner = prefix
        if isinstance(node, Function):
            yield prefix + node.name, node
        if isinstance(node, Function | ast.ClassDef):
            inner = f"{prefix}{node.name}."
        yield from _functions_in(list(ast.iter_child_nodes(node)), inner)


@cache
def all_modules() -> frozenset[str]:
    return frozenset(module_name(path) for path in sources())


@cache
def imported_modules(path: str) -> set[str]:
    """Modules of the package that a module imports, wherever in it the import stands."""
    package = module_name(path) if path.endswith("__init__.py") else module_name(path).rpartition(".")[0]
    targets: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            targets.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], base]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                targets.add(inner if inner in all_modules() else base)
    return {target for target in targets if target in all_modules() and target != module_name(path)}


@cache
def exported_functions() -> set[str]:
    """Names of functions that another module imports or that a package lists in `__all__`."""
    names: set[str] = set()
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("unmask")):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                names.update(ast.literal_eval(node.value))
    return names


def duplicate_names() -> Places:
    """Classes and exported functions whose name is defined in two modules."""
    exported = exported_functions()
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in sources().items():
        if part_of(path) == "cli":
            continue  # a command is named after the function that it calls
        for node in tree.body:
            if isinstance(node, ast.ClassDef) or (
                isinstance(node, Function) and not node.name.startswith("_") and node.name in exported
            ):
                homes[node.name].append(path)
    places: Places = defaultdict(set)
    for name, paths in homes.items():
        if len(paths) > 1:
            for path in paths:
                places[path].add(name)
    return places


def module_names() -> Places:
    """Modules and folders whose name does not say what they hold."""
    return {path: {part} for path in sources() for part in path.removesuffix(".py").split("/") if part in MODULE_NAMES}


def names_bound_in(tree: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the names of classes, functions, parameters, variables, fields and attributes that nodes introduce."""
    for node in tree:
        if isinstance(node, ast.ClassDef | Function):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


@cache
def bound_names(path: str) -> frozenset[str]:
    """Names that a module of the package introduces."""
    return frozenset(names_bound_in(nodes(path)))


def names_without_a_noun() -> Places:
    """Parameters, variables, fields and functions that are an adjective or a participle alone."""
    return {
        path: names for path in sources() if (names := {name.strip("_") for name in bound_names(path)} & ADJECTIVES)
    }


def long_functions() -> Places:
    """Functions longer than MAX_LINES, their docstring not counted."""
    places: Places = defaultdict(set)
    for path in sources():
        for name, node in functions(path):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > MAX_LINES:
                places[path].add(name)
    return places


def many_parameters() -> Places:
    """Functions with more than MAX_PARAMETERS parameters."""
    places: Places = defaultdict(set)
    for path in sources():
        for name, node in functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
            if len([a for a in arguments if a.arg not in ("self", "cls")]) > MAX_PARAMETERS:
                places[path].add(name)
    return places


def upward_imports() -> Places:
    """Imports from a package or top module that comes later in ORDER."""
    places: Places = defaultdict(set)
    for path in sources():
        part = part_of(path)
        if part in ("__init__", "__main__"):
            continue  # the door of the package and `python -m unmask` use all of it
        for target in imported_modules(path):
            if target == "unmask":
                continue  # the version; see imports_from_the_door
            other = target.split(".")[1]
            if part not in ORDER or other not in ORDER or ORDER.index(other) > ORDER.index(part):
                places[path].add(other)
    return places


def imports_from_the_door() -> Places:
    """Imports of anything but the version from `unmask` itself, which stands on all packages."""
    places: Places = defaultdict(set)
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module == "unmask" and not node.level:
                modules = {part_of(other) for other in sources()}
                places[path].update(a.name for a in node.names if a.name not in {"__version__", *modules})
    return {path: names for path, names in places.items() if names and part_of(path) != "__main__"}


def import_cycles() -> Places:
    """Modules that import each other, directly or through others; the type annotations' imports count too."""
    graph = {module_name(path): imported_modules(path) - {"unmask"} for path in sources()}
    reached: dict[str, set[str]] = {}

    def reach(start: str) -> set[str]:
        if start not in reached:
            seen: set[str] = set()
            stack = [start]
            while stack:
                for target in graph[stack.pop()]:
                    if target not in seen:
                        seen.add(target)
                        stack.append(target)
            reached[start] = seen
        return reached[start]

    return {
        path: {target for target in graph[module_name(path)] if module_name(path) in reach(target)}
        for path in sources()
        if module_name(path) in reach(module_name(path))
    }


def docstring_clauses() -> Places:
    """Docstrings that begin with a clause used as a noun ("What ...", "Whether ...") and not with a verb or a noun."""
    places: Places = defaultdict(set)
    for path, tree in sources().items():
        documented = [("module", tree), *functions(path)]
        documented += [(node.name, node) for node in nodes(path) if isinstance(node, ast.ClassDef)]
        for name, node in documented:
            first = re.match(r"\W*(\w+)", ast.get_docstring(node) or "")
            if first and first[1].lower() in CLAUSE_WORDS:
                places[path].add(name)
    return places


@cache
def sources_beside() -> dict[str, ast.Module]:
    """Every module of tests, benchmarks, examples, tools and docs by its path in the repository."""
    return {
        file.relative_to(REPOSITORY).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for folder in ("tests", "benchmarks", "examples", "tools", "docs")
        for file in sorted((REPOSITORY / folder).rglob("*.py"))
    }


def test_no_docstring_beside_the_package_begins_with_a_clause() -> None:
    """Tests, benchmarks and examples follow the rule of `docstring_clauses` as well."""
    clauses = [
        (path, first[1])
        for path, tree in sources_beside().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | Function)
        and (first := re.match(r"\W*(\w+)", ast.get_docstring(node) or ""))
        and first[1].lower() in CLAUSE_WORDS
    ]
    assert not clauses


def test_names_beside_the_package_say_what_they_hold() -> None:
    """Tests, benchmarks and examples follow the rules of `names_without_a_noun` and `module_names` as well."""
    names = [
        (path, name)
        for path, tree in sources_beside().items()
        for name in names_bound_in(ast.walk(tree))
        if name.strip("_") in ADJECTIVES
    ]
    modules = [path for path in sources_beside() if MODULE_NAMES & set(path.removesuffix(".py").split("/"))]
    assert not names and not modules


CLOCKS = words("monotonic monotonic_ns perf_counter perf_counter_ns process_time process_time_ns thread_time")
LEAST_TIMEOUT_S = 30
# Calls with a time-out as their only number.
WAITS = words("wait join result settimeout until")


def reads_clock(node: ast.AST, clock_names: set[str]) -> bool:
    """True if an expression calls a clock, or uses a name that was assigned from one."""
    return any(
        (isinstance(part, ast.Attribute) and (part.attr in CLOCKS or ast.unparse(part) == "time.time"))
        or (isinstance(part, ast.Name) and part.id in clock_names)
        for part in ast.walk(node)
    )


def is_number(node: ast.AST) -> bool:
    """True for a literal number, with its sign or computed from others."""
    arithmetic = ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop
    return all(
        isinstance(part, arithmetic) or (isinstance(part, ast.Constant) and isinstance(part.value, int | float))
        for part in ast.walk(node)
    )


def timed_asserts(test: Function) -> Iterator[str]:
    """Yield the comparisons in asserts that hold a clock against a number, or allow a number of seconds."""
    clock_names: set[str] = set()
    for node in ast.walk(test):
        if isinstance(node, ast.Assign) and reads_clock(node.value, clock_names):
            clock_names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    for node in ast.walk(test):
        if not isinstance(node, ast.Assert):
            continue
        for compare in (part for part in ast.walk(node.test) if isinstance(part, ast.Compare)):
            sides = [compare.left, *compare.comparators]
            timed = [side for side in sides if reads_clock(side, clock_names)]
            against_number = len(timed) < len(sides) and all(is_number(side) for side in sides if side not in timed)
            tolerances = [
                part
                for side in timed
                if isinstance(side, ast.BinOp)
                for part in ast.walk(side)
                if isinstance(part, ast.Constant) and isinstance(part.value, float)
            ]
            if timed and (against_number or tolerances):
                yield ast.unparse(compare)


def short_timeouts(test: ast.AST) -> Iterator[str]:
    """Yield the calls that fail when they wait a number of seconds below LEAST_TIMEOUT_S."""
    expected: set[ast.AST] = set()
    for node in ast.walk(test):
        if isinstance(node, ast.With) and "pytest.raises" in ast.unparse(node.items[0].context_expr):
            expected.update(part for statement in node.body for part in ast.walk(statement))
    for node in ast.walk(test):
        if not isinstance(node, ast.Call) or node in expected:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        waits = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
        if name in WAITS:
            waits += [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "seconds")]
        for wait in waits:
            if isinstance(wait, ast.Constant) and isinstance(wait.value, int | float) and wait.value < LEAST_TIMEOUT_S:
                yield ast.unparse(node)


def test_no_test_asserts_seconds() -> None:
    """Tests compare counts and orders: on a busy machine, everything may take a hundred times as long.

    Times belong into benchmarks/. A time-out that ends a hanging test is at least LEAST_TIMEOUT_S, unless the test
    expects it to pass.
    """
    places = [
        (path, place)
        for path, tree in sources_beside().items()
        if path.startswith("tests/")
        for place in itertools.chain(
            short_timeouts(tree),
            *(timed_asserts(node) for node in ast.walk(tree) if isinstance(node, Function)),
        )
    ]
    assert not places


def missing_packages() -> Places:
    """Names in ORDER that are not there."""
    present = {part_of(path) for path in sources()}
    return {name: {"missing"} for name in ORDER if name not in present}


RULES: dict[str, Callable[[], Places]] = {
    rule.__name__: rule
    for rule in (
        duplicate_names,
        module_names,
        names_without_a_noun,
        long_functions,
        many_parameters,
        upward_imports,
        imports_from_the_door,
        import_cycles,
        docstring_clauses,
        missing_packages,
    )
}


@pytest.mark.parametrize("rule", RULES)
def test_no_place_breaks_the_rule(rule: str) -> None:
    places = RULES[rule]()
    assert not places, f"{RULES[rule].__doc__} Mend: {dict(places)}"


# For each rule a package that breaks it: path below unmask/ -> source.
OFFENCES: dict[str, dict[str, str]] = {
    "duplicate_names": {"home.py": "class Place: ...", "disk.py": "class Place: ..."},
    "module_names": {"storage/utils.py": ""},
    "names_without_a_noun": {"home.py": "def find(wanted): ..."},
    "long_functions": {"home.py": "def long():\n" + "    pass\n" * MAX_LINES},
    "many_parameters": {"home.py": f"def wide({', '.join(f'p{n}' for n in range(MAX_PARAMETERS + 1))}): ..."},
    "upward_imports": {"home.py": "from unmask.encoder.loading import load", "encoder/loading.py": "def load(): ..."},
    "imports_from_the_door": {"cli/encode.py": "from unmask import Encoder"},
    "import_cycles": {"disk.py": "import unmask.tables", "tables.py": "def read():\n    from unmask import disk"},
    "docstring_clauses": {"home.py": 'def home():\n    """What is the folder."""'},
    "missing_packages": {"home.py": ""},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_finds_what_breaks_it(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule whose subject has gone from the package would never fail again."""
    package = {path: ast.parse(source) for path, source in OFFENCES[rule].items()}
    monkeypatch.setattr(sys.modules[__name__], "sources", lambda: package)
    caches = (nodes, functions, all_modules, imported_modules, exported_functions, bound_names)
    for function in caches:
        function.cache_clear()
    try:
        assert RULES[rule]()
    finally:
        for function in caches:
            function.cache_clear()


def test_the_picture_shows_the_packages_in_their_order() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.split("```")[1]
    drawn = re.findall(r"^  (\w+)(?:/|\.py)", picture, flags=re.M)
    present = {part_of(path) for path in sources()} - {"__init__", "__main__"}
    assert set(drawn) == present
    assert [name for name in drawn if name in ORDER] == [name for name in ORDER if name in present]
