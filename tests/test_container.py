"""Dockerfile and compose.yaml: parsed here, since the machines that test have no Docker engine.

The slow test runs the image's own commands, `pip install` and `unmask serve`, in a clean virtual environment.
"""

import importlib.metadata
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def dockerfile() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def last_stage() -> dict[str, str]:
    """Instructions of the stage that is shipped; of several of one kind the last one counts."""
    instructions = dockerfile()
    start = max(place for place, (name, _) in enumerate(instructions) if name == "FROM")
    return dict(instructions[start:])


def test_the_image_runs_as_a_user_without_privileges_and_reports_its_health():
    stage = last_stage()
    assert stage["USER"] not in ("root", "0")
    assert "/ready" in stage["HEALTHCHECK"]
    assert json.loads(stage["ENTRYPOINT"]) == ["unmask"]


def test_every_copied_path_exists_and_is_not_ignored():
    ignore_rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for name, arguments in dockerfile():
        if name == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignore_rules


def test_images_are_pinned_to_a_version():
    stages = [arguments.split()[0] for name, arguments in dockerfile() if name == "FROM"]
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for image in [*stages, *(service["image"] for service in services.values() if "image" in service)]:
        assert re.search(r":\d", image), f"{image} has no version"


def test_compose_starts_the_server_after_healthy_stores():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    assert set(services) == {"server", "postgres", "redis"}
    assert services["server"]["depends_on"] == {
        "postgres": {"condition": "service_healthy"},
        "redis": {"condition": "service_healthy"},
    }
    for store in ("postgres", "redis"):
        assert services[store]["healthcheck"]["test"]
        assert "ports" not in services[store], f"{store} must not be reachable from outside"
    mounted = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert mounted == set(compose["volumes"])
    assert "POSTGRES_PASSWORD:?" in services["server"]["environment"]["PGPASSWORD"]


@pytest.mark.parametrize("command", ["image", "compose"])
def test_the_server_understands_the_commands(command: str, unmask):
    if command == "image":
        arguments = json.loads(last_stage()["CMD"])
    else:
        arguments = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["server"]["command"]
    # A value that the settings refuse ends the command after all options were read, and before anything is loaded.
    answer = unmask(*arguments, "--request-timeout", "0")
    assert answer.returncode == 1
    assert "timeout" in answer.stderr


def link_requirements(extras: str, target: Path) -> None:
    """Put links to everything that `unmask[extras]` requires into a folder, and to nothing else.

    pip then finds the requirements installed, and a module that no requirement brings is missing as it would be in the
    image; downloading and unpacking torch anew would take minutes.
    """
    waiting, linked = [Requirement(f"unmask[{extras}]")], set[str]()
    while waiting:
        requirement = waiting.pop()
        distribution = importlib.metadata.distribution(requirement.name)
        if requirement.name != "unmask":
            for name in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                source = Path(str(distribution.locate_file(name)))
                if source.exists() and not (target / name).exists():
                    (target / name).symlink_to(source)
        for needed in map(Requirement, distribution.requires or ()):
            chosen = ("", *requirement.extras)
            applies = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in chosen)
            if applies and str(needed) not in linked:
                linked.add(str(needed))
                waiting.append(needed)


@pytest.mark.slow
def test_the_commands_of_the_image_install_and_serve_in_a_clean_environment(tmp_path: Path, isolated_home: Path):
    folder = tmp_path / "clean"
    venv.create(folder, with_pip=False)  # unpacking a pip takes three seconds
    install = next(rest for name, rest in dockerfile() if name == "RUN" and "pip install" in rest)
    arguments = shlex.split(install)[1:]
    index = arguments.index("--extra-index-url")  # the machine's own index serves torch here
    del arguments[index : index + 2]
    arguments.remove("--no-cache-dir")
    (requirement,) = (word for word in arguments if word.startswith(".["))
    (packages,) = (folder / "lib").glob("python*/site-packages")
    link_requirements(requirement[2:-1], packages)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, *arguments], cwd=ROOT, check=True, stdout=sys.stderr)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [word.replace("0.0.0.0", "127.0.0.1") for word in json.loads(last_stage()["CMD"])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"UNMASK_HOME": str(isolated_home), "UNMASK_DATABASE": f"sqlite:///{tmp_path}/accounts.sqlite"}
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        command = [folder / "bin" / "unmask", *serve, "--port", str(port)]
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        probe = json.loads(last_stage()["HEALTHCHECK"].partition("CMD ")[2])
        probe = [str(folder / "bin" / probe[0]), *(word.replace(":8080", f":{port}") for word in probe[1:])]
        for _ in range(300):
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                break
            assert server.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(1)
        else:
            pytest.fail(f"the server did not become ready:\n{log.read_text(encoding='utf-8')}")
    finally:
        server.terminate()
        server.wait()
