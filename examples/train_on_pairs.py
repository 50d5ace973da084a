"""Train the default model on your own pairs of query and answer.

Run it with: python examples/train_on_pairs.py RUN [STEPS]
"""

import json
import sys
from pathlib import Path

import unmask

PAIRS = [
    ("reset my password", "Open Settings, choose Security, and click Reset."),
    ("invoice is wrong", "Reply to the billing mail within 14 days to dispute a charge."),
    ("parcel has not arrived", "Deliveries take three working days; then write to logistics."),
    ("cancel my contract", "A subscription ends at the end of the month after you give notice."),
    ("app does not start", "Update to the newest release and restart your phone."),
    ("change my address", "Your profile page has a form for where you live."),
    ("pay by bank transfer", "Add your IBAN under payment methods."),
    ("talk to a human", "Our hotline is open from nine to five."),
]
RECIPE = """
base = "unmask/smollm2-embed-6l"
objective = "supervised"
steps = {steps}
max_length = 64

[optimiser]
lr = 5e-4
warmup = 2

[batch]
size = 8

[[data]]
name = "support"
path = "pairs.jsonl"
query = "query"
positive = "positive"
"""


def margin(model: str | Path) -> float:
    """Mean cosine of each query with its own answer, minus that with the other answers."""
    encoder = unmask.Encoder.load(model)
    queries, answers = zip(*PAIRS, strict=True)
    cosines = encoder.similarity(encoder.encode_query(queries), encoder.encode_document(answers))
    own, others = cosines.diagonal(), cosines.sum(axis=1) - cosines.diagonal()
    return float((own - others / (len(PAIRS) - 1)).mean())


if len(sys.argv) < 2:
    sys.exit(__doc__)
folder = Path(sys.argv[1])
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

folder.mkdir(parents=True, exist_ok=True)
lines = [json.dumps({"query": query, "positive": positive}) for query, positive in PAIRS]
(folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
(folder / "recipe.toml").write_text(RECIPE.format(steps=steps), encoding="utf-8")
unmask.train(folder / "recipe.toml", output=folder / "training")

print(f"before: {margin('unmask/smollm2-embed-6l'):.3f}")
print(f"after:  {margin(folder / 'training' / 'adapter'):.3f}")
