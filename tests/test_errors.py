"""The tree that `unmask/errors.py` draws is the tree of its classes."""

import re

from unmask import errors


def test_the_drawing_shows_every_class_below_its_base() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for branch, name in re.findall(r"^((?:[│ ]   )*(?:[├└]── )?)(\w+)(?:  |$)", errors.__doc__ or "", re.MULTILINE):
        depth = len(branch) // 4
        if depth or name == "UnmaskError":
            path[depth:] = [name]
            drawn[name] = path[depth - 1] if depth else "Exception"
    classes = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.UnmaskError)
    ]
    assert drawn == {each.__name__: each.__bases__[0].__name__ for each in classes}
    assert len(drawn) > 30
