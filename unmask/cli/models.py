"""`unmask models ...`: the models that ship."""

from cyclopts import App

from unmask.cli.options import AsJson
from unmask.cli.terminal import print_table, say

models = App(name="models", help="List the models that ship with unmask.")


@models.default
def list_models(*, as_json: AsJson = False) -> int:
    """List the models that ship, and say which of them are stored on this machine."""
    from unmask.catalogue import shipped_records
    from unmask.home import home

    rows = []
    for record in shipped_records().values():
        stored = any((home() / "models" / record.id).glob("*.gguf"))
        rows.append((record.id, record.dimensions, record.max_tokens, record.licence, stored, record.summary))
    headings = ("model", "dimensions", "tokens", "licence", "stored", "summary")
    if not as_json:
        rows = [(*row[:4], "yes" if row[4] else "no", row[5]) for row in rows]
    print_table(headings, rows, unknown="?", as_json=as_json)
    say("A command also takes a hub id, a folder in the hub's layout or a .gguf file as model.")
    return 0
