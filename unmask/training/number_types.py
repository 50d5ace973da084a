"""Types of numbers in a recipe, with the values they allow."""

from typing import Annotated

from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Rate = Annotated[float, Meta(gt=0.0)]
# Dropout of everything leaves nothing to learn from.
DropoutRate = Annotated[float, Meta(ge=0.0, lt=1.0)]
