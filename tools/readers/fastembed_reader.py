"""Read an ONNX folder by fastembed, in a Python that has fastembed's packages and no others.

    python -S fastembed_reader.py FOLDER FILE NUMBERS

FILE is the graph's path in the folder, NUMBERS the length of a vector. The first line on standard output is a JSON
object with the version. Each line on standard input, {"texts": [...], "batch": n}, is answered by {"vectors": [...]}.
"""

import json
import sys
from importlib.metadata import version

from fastembed import TextEmbedding  # pyright: ignore[reportMissingImports]: not in this environment
from fastembed.common.model_description import ModelSource, PoolingType  # pyright: ignore[reportMissingImports]


def main() -> None:
    folder, file, numbers = sys.argv[1:]
    TextEmbedding.add_custom_model(
        model="local/exported",
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(url="local"),
        dim=int(numbers),
        model_file=file,
        output_name="sentence_embedding",
    )
    model = TextEmbedding("local/exported", specific_model_path=folder, threads=1)
    print(json.dumps({"version": version("fastembed")}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        vectors = model.embed(request["texts"], batch_size=request["batch"])
        print(json.dumps({"vectors": [vector.tolist() for vector in vectors]}), flush=True)


main()
