"""`EncodeJob`: a bulk job as data. This module imports no torch, for the command line."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal


@dataclass(frozen=True)
class EncodeJob:
    """Files of texts to encode, and how. These fields are the options of `unmask encode`.

    Attributes:
        inputs: Files of texts: txt (one text per line), jsonl, csv, tsv or parquet, also gzipped. A folder stands for
            the files in it, a glob for those it matches. URLs: s3://, gs://, abfs://, hf://. "-" is standard input.
        output: An npy, parquet or jsonl file, or "-" for standard output. A folder (a name that ends in /) or a URL
            gets parts of at most 8,192 rows instead, which several machines can write and read.
        input_format: Format of the input, if the name does not show it.
        output_format: Format of the output, if the name does not show it. Parts are parquet by default.
        column: Column or field that holds the text (jsonl, csv, tsv, parquet).
        instruction: Task description. The model reads it before each text; its tokens are not pooled.
        normalize: Scale each vector to length 1.
        dimensions: Keep only the first N dimensions of each vector.
        on_empty: An empty text stops the run, or becomes a row without a vector (NaN in npy, null elsewhere).
        on_long: A text that does not fit the model is cut and counted, or stops the run.
        restart: Discard an unfinished run and replace a finished output.
        same_bits: Refuse to go on with a run into a folder that another kind of processor began. Its vectors may
            differ in their last bits.
    """

    inputs: tuple[str, ...]
    output: str
    _: KW_ONLY
    input_format: Literal["txt", "jsonl", "csv", "tsv", "parquet"] | None = None
    output_format: Literal["npy", "parquet", "jsonl"] | None = None
    column: str = "text"
    instruction: str = ""
    normalize: bool = False
    dimensions: int | None = None
    on_empty: Literal["error", "null"] = "error"
    on_long: Literal["truncate", "error"] = "truncate"
    restart: bool = False
    same_bits: bool = False
