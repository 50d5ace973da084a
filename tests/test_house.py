"""The rules of the package: one meaning per name, the field's words, short functions, imports in one direction.

`python tests/test_house.py` prints the places that break a rule, by package. PENDING lists the places that are
known and still to be mended. It only shrinks: a place that is not listed fails, and so does a listed place that no
longer breaks the rule. `python tests/test_house.py --shrink` rewrites the list after mending, and refuses to make it
longer; a place that moved with its file stays one place.
"""

import ast
import itertools
import re
import sys
import textwrap
from collections import Counter, defaultdict
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

# Module names that say nothing of the content, and drawers.
MODULE_NAMES = words(
    "asked shown twins wanting seams private operating entrance visitors following story wording ahead packed cores "
    "exchange lines bars plots utils helpers common manager base"
)
# Names without a subject, as the name of a parameter, a variable, a field or a function.
ADJECTIVES = words("found wanted known given told kept wrong asked shown")
# Replaced names, of classes, functions, parameters, variables and fields (docs/glossary.md has the new ones).
OLD_NAMES = words(
    "held_apart touches epochs_at_most limits_without afresh keeps_rows packs_at_once each_on_a_core split_as of_first "
    "unless_gone at_once uncut Contender Cut Trainee Gaps Spans Exchange Admitted Draw Follower Bench Shown WantIt "
    "Seams Reception Kept"
)
# Names that are good elsewhere, and replaced in the modules whose path begins so.
OLD_NAMES_IN = {
    "encoder/": words("width inner bounds longest deal finish in_flight seal unseal Run turns"),
    "checkpoint/": words("width inner"),
    "training/": words("width inner bounds longest whole turns say"),
    "training/distributed": {"first"},
    "router/": words("look begin learn Models standing Standing"),
    "storage/": {"tidy"},
    "accounts/": words("tidy Level"),
    "onboarding/": {"tell"},
    "api/": {"Gate"},
    "web/": words("standing seen"),
}
# First words of a docstring that make a clause out of a noun.
CLAUSE_WORDS = words("what whatever whether who whoever whom whose how where when which why")

PENDING: dict[str, dict[str, str]] = {}

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


def old_names() -> Places:
    """Names for which the field has a word."""
    places: Places = {}
    for path in sources():
        replaced = OLD_NAMES.union(*(names for prefix, names in OLD_NAMES_IN.items() if path.startswith(prefix)))
        if names := {name.lstrip("_") for name in bound_names(path)} & replaced:
            places[path] = names
    return places


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


def audit_calls() -> Places:
    """Calls of `audit.note` outside accounts: an act that must be audited writes its own row."""
    return {
        path: {"audit.note"}
        for path in sources()
        if part_of(path) != "accounts"
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and node.attr == "note"
        and isinstance(node.value, ast.Name)
        and node.value.id == "audit"
    }


def device_branches() -> Places:
    """Uses of `._gpu` outside encoder/runtime/: the runtime decides where a forward runs."""
    return {
        path: {"_gpu"}
        for path in sources()
        if not path.startswith("encoder/runtime/")
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr == "_gpu"
    }


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
        old_names,
        long_functions,
        many_parameters,
        upward_imports,
        imports_from_the_door,
        import_cycles,
        docstring_clauses,
        audit_calls,
        device_branches,
        missing_packages,
    )
}


@cache
def places_of(rule: str) -> Places:
    return RULES[rule]()


def flat(places: Places) -> set[tuple[str, str]]:
    return {(path, name) for path, names in places.items() for name in names}


def pending(rule: str) -> set[tuple[str, str]]:
    return {(path, name) for path, names in PENDING.get(rule, {}).items() for name in words(names)}


@pytest.mark.parametrize("rule", RULES)
def test_no_new_place_breaks_the_rule(rule: str) -> None:
    new = flat(places_of(rule)) - pending(rule)
    assert not new, f"{RULES[rule].__doc__} Mend: {sorted(new)}"


@pytest.mark.parametrize("rule", RULES)
def test_a_mended_place_is_off_the_list(rule: str) -> None:
    mended = pending(rule) - flat(places_of(rule))
    assert not mended, f"no longer break the rule; run python tests/test_house.py --shrink: {sorted(mended)}"


def test_the_picture_shows_the_packages_in_their_order() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.split("```")[1]
    drawn = re.findall(r"^  (\w+)(?:/|\.py)(?! +\(to come\))", picture, flags=re.M)
    present = {part_of(path) for path in sources()} - {"__init__", "__main__"}
    assert set(drawn) == present
    assert [name for name in drawn if name in ORDER] == [name for name in ORDER if name in present]


def print_by_package() -> None:
    """Print every place that breaks a rule, by package, and the number of each rule."""
    rows = [(part_of(path), path, rule, name) for rule in RULES for path, name in flat(places_of(rule))]
    for part, group in itertools.groupby(sorted(rows), key=lambda row: row[0]):
        print(f"\n{part}")
        for (path, rule), names in itertools.groupby(group, key=lambda row: row[1:3]):
            print(f"  {path}: {rule}: {' '.join(row[3] for row in names)}")
    print()
    for rule, number in Counter(row[2] for row in rows).items():
        print(f"{number:5}  {rule}: {RULES[rule].__doc__}")


def shrink() -> None:
    """Rewrite PENDING with the places that still break a rule.

    Raises:
        SystemExit: A rule has more places than before, or places of other names.
    """
    block = ["PENDING: dict[str, dict[str, str]] = {"]
    for rule in RULES:
        places = places_of(rule)
        new = Counter(name for _, name in flat(places)) - Counter(name for _, name in pending(rule))
        if new and PENDING:
            sys.exit(f"{rule}: new places: {dict(new)}")
        if places:
            block.append(f'    "{rule}": {{')
            for path, names in sorted(places.items()):
                lines = textwrap.wrap(" ".join(sorted(names)), 90, break_long_words=False, break_on_hyphens=False)
                text = " ".join(f'"{line}"' if line == lines[-1] else f'"{line} "' for line in lines)
                block.append(f'        "{path}": {text if len(lines) == 1 else f"({text})"},')
            block.append("    },")
    file = Path(__file__)
    text = file.read_text(encoding="utf-8")
    start, end = text.index("PENDING: dict"), text.index("\n\nPlaces = ")
    body = "\n".join([*block, "}"]) if len(block) > 1 else "PENDING: dict[str, dict[str, str]] = {}"
    file.write_text(text[:start] + body + text[end:], encoding="utf-8")


if __name__ == "__main__":
    shrink() if "--shrink" in sys.argv[1:] else print_by_package()
