"""`benchmarks/turns.py`: everybody is first in turn, and nobody is left out."""

from hypothesis import given
from hypothesis import strategies as st
from turns import turns


@given(st.lists(st.integers(), min_size=1, max_size=8, unique=True), st.integers(0, 20))
def test_everybody_is_measured_in_each_round(subjects: list[int], number: int) -> None:
    assert sorted(turns(subjects, number)) == sorted(subjects)
    firsts = {turns(subjects, number + turn)[0] for turn in range(len(subjects))}
    assert firsts == set(subjects)
