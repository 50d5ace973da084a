"""Put a trained model into the package: weights, model card, canary, measurements, golden vectors.

    unmask evaluate 'RUN/best?name=unmask/NAME' 'RUN/best?dimensions=256&name=256' --baseline ... \
        --suite local --data DATA/eval --output docs/evaluation
    python tools/release_model.py RUN/best --name NAME --results docs/evaluation/results.json

The record `unmask/catalogue/records/NAME.toml` is written by hand before; it holds no figure of a measurement. Nothing
is written before everything is checked. A second run replaces what the first one wrote, and adds no measurement twice.

Files written:
    unmask/checkpoint/layers/NAME/               weights, their settings, run.json, README.md
    unmask/catalogue/records/NAME.toml           its [canary]
    unmask/catalogue/measurements/*.jsonl        the values of every model of the evaluation that has a record
    tests/golden/shipped_vectors.json            the first numbers of a few vectors
"""

import argparse
import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from model_card import find_measured, render_card

from unmask.catalogue import Record, append_measurements, measurements_of, parse_record
from unmask.catalogue.canary import CANARY_TEXT, make_canary
from unmask.catalogue.measurement import Measurement, read_measurements
from unmask.checkpoint import open_checkpoint
from unmask.checkpoint.resolve import EMBEDDING_FROM
from unmask.checkpoint.shipped import SHIPPED
from unmask.disk import atomic_write
from unmask.encoder import Encoder
from unmask.errors import UnmaskError, UsageError
from unmask.evaluate.results import Results, read_results

LARGEST = 25_000_000  # bytes of a folder; all folders and the adapter stay under the 60 MB that a wheel may take

REQUIRED, OPTIONAL = ("config.json", "llm2vec_config.json", "model.safetensors"), ("head.safetensors",)
NUMBERS = 8  # of a golden vector

_ABSOLUTE = re.compile(r"(?:(?<=^)|(?<=:))/(?!/)[^?]*/([^/?]+)")


@dataclass(frozen=True)
class Release:
    """A model on its way into the package.

    Attributes:
        folder: result of a run: `RUN/best`, `RUN/model`, or one of an exit, such as `RUN/best-4-layers`.
        name: without owner; the id is `unmask/NAME`.
        results: `results.json` of `unmask evaluate`, in the repository, because measurements cite it.
        root: the repository.
        earlier: `run.json` of the runs whose result this one began with, first to last.
    """

    folder: Path
    name: str
    results: Path
    root: Path
    earlier: Sequence[Path] = ()

    @property
    def record_file(self) -> Path:
        return self.root / "unmask" / "catalogue" / "records" / f"{self.name}.toml"

    @property
    def target(self) -> Path:
        return self.root / "unmask" / "checkpoint" / "layers" / self.name


def release(model: Release) -> None:
    """Check a model, and write it into the repository.

    Raises:
        UsageError: a part is missing, or two parts do not belong together. Nothing was written then.
    """
    files = weight_files(model.folder)
    run = shorten_paths(_read_json(model.folder.parent / "run.json"))
    earlier = [shorten_paths(_read_json(file)) for file in model.earlier]
    encoder = Encoder.load(str(model.folder), dtype="float32")
    record = read_record(model, encoder)
    if not model.results.resolve().is_relative_to(model.root.resolve()):
        raise UsageError(f"{model.results} is outside of {model.root}; measurements can only cite a committed file")
    results = read_results(model.results)
    if any(word.startswith(("/", "st:/", "~")) for word in shlex.split(results.provenance.command)):
        raise UsageError(
            f"the command in {model.results} holds a path of this machine; repeat it with relative paths, finished "
            "tasks are not measured again"
        )
    measured = find_measured(results, open_checkpoint(model.folder).revision)
    raw = model.results.resolve().relative_to(model.root.resolve())
    report = (raw.parent / "report.md").as_posix()
    card = render_card(record, run, model.folder, results, measured, report, earlier)
    values = new_measurements(model.root, results, {measured.plain.name: record.id}, raw.as_posix())

    write_folder(model.target, files, [*earlier, run], card)
    write_canary(model.record_file, encoder)
    write_vectors(model.root / "tests" / "golden" / "shipped_vectors.json", record.id, encoder)
    for file, measurements in values.items():
        append_measurements(file, measurements)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a result folder that ship.

    Raises:
        UsageError: one is missing, another is there, they are too large, or another base gives the embedding.
    """
    files = [folder / name for name in REQUIRED] + [folder / name for name in OPTIONAL if (folder / name).is_file()]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"{folder} has no {missing[0]}; name a result folder of a run, such as RUN/best")
    others = sorted({file.name for file in folder.iterdir()} - {file.name for file in files})
    base = _read_json(folder / "config.json").get(EMBEDDING_FROM)
    if others or base is None:
        raise UsageError(
            f"{folder} holds {', '.join(others) or 'a token embedding'} besides its layers; "
            "train with [save] embedding = false"
        )
    if base not in SHIPPED or SHIPPED[base].adapter is not None or SHIPPED[base].layers_folder is not None:
        raise UsageError(f"{folder} takes its token embedding from {base}, which is no decoder that ships")
    size = sum(file.stat().st_size for file in files)
    if size > LARGEST:
        raise UsageError(
            f"{folder} has {size / 1e6:.1f} MB and {LARGEST / 1e6:.0f} are allowed; train with [save] precision = "
            '"int8", or fewer layers'
        )
    return files


def shorten_paths(part: Any) -> Any:
    """Return a JSON value in which each absolute path is its last part: `st:/a/b/model?x=1` -> `st:model?x=1`."""
    if isinstance(part, Mapping):
        return {key: shorten_paths(value) for key, value in part.items()}
    if isinstance(part, list):
        return [shorten_paths(value) for value in part]
    return _ABSOLUTE.sub(r"\1", part) if isinstance(part, str) else part


def read_record(model: Release, encoder: Encoder) -> Record:
    """Read the hand-written record, and compare its facts with the model's files.

    Raises:
        UsageError: there is none, or a fact differs.
    """
    if not model.record_file.is_file():
        raise UsageError(f"{model.record_file} is missing; write it by hand, after another model's")
    record = parse_record(model.record_file.read_text(encoding="utf-8"), model.record_file.name)
    config = encoder.checkpoint.encoder_config
    facts = {
        "id": f"unmask/{model.name}",
        "parameters": encoder.num_parameters,
        "dimensions": encoder.dim,
        "matryoshka": tuple(config.get("matryoshka") or ()),
        "max_tokens": encoder.max_length,
        "pooling": encoder.pooling,
    }
    wrong_facts = [
        f"{field} is {fact!r}, the record has {getattr(record, field)!r}"
        for field, fact in facts.items()
        if getattr(record, field) != fact
    ]
    if wrong_facts:
        raise UsageError(f"{model.record_file.name}: " + "; ".join(wrong_facts))
    return record


def new_measurements(root: Path, results: Results, ids: Mapping[str, str], raw: str) -> dict[Path, list[Measurement]]:
    """Return the measurements to append, by file: of every evaluated model with a record.

    Args:
        ids: id of the record by the name in the results, where it is not the id or its last part.
        raw: path of the results in the repository.
    """
    values = {}
    for file in sorted((root / "unmask" / "catalogue" / "records").glob("*.toml")):
        record = parse_record(file.read_text(encoding="utf-8"), file.name)
        name = _name_in(results, record.id, ids)
        if name is None:
            continue
        target = root / "unmask" / "catalogue" / "measurements" / f"{file.stem}.jsonl"
        present = read_measurements(target) if target.is_file() else []
        measurements = measurements_of(results, name, record.id, by="unmask", raw=raw)
        if present[-len(measurements) :] != measurements:
            values[target] = measurements
    return values


def _name_in(results: Results, id: str, ids: Mapping[str, str]) -> str | None:
    names = [model.name for model in results.models]
    return next((name for name in names if ids.get(name, name) in (id, id.rpartition("/")[2])), None)


def write_folder(target: Path, files: Sequence[Path], runs: Sequence[Mapping[str, Any]], card: str) -> None:
    """Write the folder of a model, in place of an earlier one: the last run as `run.json`, others as `run-1.json`."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, partial / file.name)
    for number, run in enumerate(runs, start=1):
        name = "run.json" if number == len(runs) else f"run-{number}.json"
        (partial / name).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_canary(file: Path, encoder: Encoder) -> None:
    """Put the canary at the end of a record, in place of an earlier one."""
    vector = make_canary(CANARY_TEXT, encoder.encode(CANARY_TEXT)[0]).vector
    lines = "\\\n".join(vector[at : at + 118] for at in range(0, len(vector), 118))
    text = file.read_text(encoding="utf-8").partition("\n[canary]\n")[0].rstrip()
    table = f'[canary]\ntext = "{CANARY_TEXT}"\nvector = """\\\n{lines}\\\n"""\n'
    with atomic_write(file) as partial:
        partial.write_text(f"{text}\n\n{table}", encoding="utf-8")


def write_vectors(file: Path, id: str, encoder: Encoder) -> None:
    """Put the first numbers of a model's normalised vectors of the golden texts into the file of all models."""
    vectors = _read_json(file)
    texts = list(next(iter(vectors.values())))
    first = encoder.encode(texts, normalize=True)[:, :NUMBERS]
    vectors[id] = {text: [round(float(number), 6) for number in row] for text, row in zip(texts, first, strict=True)}
    blocks = []
    for model, rows in vectors.items():
        lines = ",\n".join(f"  {json.dumps(text)}: {json.dumps(numbers)}" for text, numbers in rows.items())
        blocks.append(f" {json.dumps(model)}: {{\n{lines}\n }}")
    with atomic_write(file) as partial:
        partial.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error


def main() -> int:
    """Release the model of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="result folder of a run, such as RUN/best or RUN/best-4-layers")
    parser.add_argument("--name", required=True, help="the model's name without its owner: smollm2-embed-6l")
    parser.add_argument("--results", type=Path, required=True, help="results.json of unmask evaluate")
    parser.add_argument("--earlier", type=Path, action="append", default=[], help="run.json of a run before; repeat it")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="the repository")
    options = parser.parse_args()
    model = Release(options.folder, options.name, options.results, options.root, options.earlier)
    try:
        release(model)
    except UnmaskError as error:
        print(f"release_model: {error}", file=sys.stderr)
        return 2
    print(f"wrote {model.target.relative_to(options.root)}; now: pytest tests/encoder/test_shipped_model.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
