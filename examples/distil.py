"""Distil an encoder into a decoder of six layers that reads texts like yours, and into one of four along the way.

Run it with: python examples/distil.py RUN TEXTS.txt [STEPS] [TEACHER]

TEXTS.txt holds one text per line. TEACHER is any model that `unmask evaluate` can name: a shipped one, or
`st:FOLDER` for a folder of sentence-transformers. Several teachers are written as several tables.
"""

import json
import sys
from pathlib import Path

import unmask

RECIPE = """
base = "unmask/smollm2-135m"
objective = "supervised"
steps = {steps}
layers = 6
lora = false
freeze_embedding = true
max_length = 128
evaluate_every = {steps}

[[exits]]
layers = 4

[head]
dimensions = 256
lr = 1e-3

[optimiser]
lr = 3e-4
schedule = "wsd"

[batch]
size = 64
forward_tokens = 1100
graph_tokens = 20000

[distillation]
dimensions = 256
vector_weight = 10.0

[[distillation.teachers]]
model = "{teacher}"

[save]
precision = "int8"
embedding = false

[[data]]
name = "texts"
path = "{texts}"
text = "text"
use_labels = false
held_out = {held_out}
"""

if len(sys.argv) < 3:
    sys.exit(__doc__)
folder, texts = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 500
teacher = sys.argv[4] if len(sys.argv) > 4 else "unmask/smollm2-embed-6l"

folder.mkdir(parents=True, exist_ok=True)
held_out = max(1, len(texts.read_text(encoding="utf-8").splitlines()) // 20)
recipe = RECIPE.format(steps=steps, teacher=teacher, texts=texts.as_posix(), held_out=held_out)
(folder / "recipe.toml").write_text(recipe, encoding="utf-8")
unmask.train(folder / "recipe.toml", output=folder / "training")

metrics = [json.loads(line) for line in (folder / "training" / "metrics.jsonl").read_text().splitlines()]
cosine = next(line["scores"]["held-out cosine"] for line in reversed(metrics) if "scores" in line) / 100
print(f"cosine of held-out texts to the teacher's vectors: {cosine:.2f}")
for name in ("model", "model-4-layers"):
    model = folder / "training" / name
    megabytes = sum(file.stat().st_size for file in model.iterdir()) / 1e6
    vectors = unmask.Encoder.load(model).encode(["How do I reset my password?"])
    print(f"{name}: {megabytes:.0f} MB, vectors of {vectors.shape[1]} numbers")
