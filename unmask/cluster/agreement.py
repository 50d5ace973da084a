"""Compare a process on a cluster with this one and with the first of its kind, so that no two vectors are mixed."""

from collections.abc import Mapping
from typing import Any

from unmask.bulk.units import package_versions
from unmask.errors import ClusterError

_SAME_MODEL = "give all machines the same model"


def require_equal_versions(process: str, versions: Mapping[str, str]) -> None:
    """Compare the packages of another process with those of this one. Python's version may differ.

    Args:
        process: name of the other process in messages.
        versions: its versions, see `package_versions`.

    Raises:
        ClusterError: a version differs.
    """
    own = package_versions()
    for name, version in versions.items():
        if name != "python" and version != own[name]:
            raise ClusterError(
                f"{process} has {name} {version}, and this process {own[name]}; install the same on all machines"
            )


def require_equal_models(
    process: str, model: Mapping[str, Any], first: str, first_model: Mapping[str, Any], advice: Mapping[str, str]
) -> None:
    """Compare the model of a process with that of the first process.

    Args:
        process, first: names of the processes in messages.
        model, first_model: what decides their vectors, by name.
        advice: what to do about a difference, by its name; by default, to give all machines the same model.

    Raises:
        ClusterError: the models differ.
    """
    for name, value in model.items():
        if value != first_model[name]:
            raise ClusterError(
                f"{process} has {name} {value}, and {first} {first_model[name]}; {advice.get(name, _SAME_MODEL)}"
            )
