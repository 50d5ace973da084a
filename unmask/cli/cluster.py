"""`unmask cluster ...`: the machines that `--cluster` uses."""

import math
from dataclasses import asdict
from typing import Annotated

from cyclopts import App, Parameter

from unmask.cli.encode import ModelOptions
from unmask.cli.options import AsJson
from unmask.errors import UsageError
from unmask.terminal import print_json, print_table, say

_DEFAULT = ModelOptions()
cluster = App(name="cluster", help="Check the machines of a Ray cluster.")


@cluster.command
def check(
    address: Annotated[str, Parameter(name="--cluster")] = "auto",
    *,
    storage: str | None = None,
    wait: float = 300.0,
    model: ModelOptions = _DEFAULT,
    as_json: AsJson = False,
) -> int:
    """Check versions, tokens, processors, the model's vectors and the bandwidth of every machine.

    The exit code is 1 if something needs attention.

    Parameters
    ----------
    address
        auto (RAY_ADDRESS, or the cluster of this machine), HOST:PORT of the cluster's head, or local, which starts one
        here.
    storage
        Folder or URL of an output: read and write it from every machine.
    wait
        Seconds that a machine may take for an answer.
    """
    if not 0 < wait < math.inf:
        raise UsageError(f"--wait {wait:g}: give a number of seconds above 0")
    if model.max_length is not None and model.max_length < 1:
        raise UsageError(f"--max-length {model.max_length}: give 1 or more")
    from unmask.cluster.check import check_cluster

    rows = check_cluster(address, model.load, storage, wait)
    faults = sum(bool(row.advice) for row in rows)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        print_table(
            ("machine", "check", "value", "what to do"),
            [(row.machine, row.check, row.value, row.advice or "-") for row in rows],
        )
        say(f"{faults} of {len(rows)} rows need attention" if faults else "all is well")
    return 1 if faults else 0
