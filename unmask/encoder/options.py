"""Values that options of `Encoder.load` can take. This module imports no torch, for the command line."""

from typing import Literal

Compat = Literal["default", "reference"]

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
# "auto" becomes one of the others when a model is loaded.
DtypeChoice = Literal["auto", Dtype]
