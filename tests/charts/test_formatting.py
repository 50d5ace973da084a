"""Numbers and names as people read them."""

from unmask.charts import formatting

LONG = "an-organisation/a-model-with-a-long-name-that-ends-in-what-tells-it-apart-v2"


def test_numbers() -> None:
    assert formatting.signed(-0.004) == "0.00" and formatting.signed(-1.2, 1) == "−1.2"
    assert formatting.signed(None) == "–"
    assert formatting.magnitude(134_515_008) == "135 M" and formatting.magnitude(1_204_000_000, "B") == "1.2 GB"
    assert formatting.magnitude(7_111_000_000) == "7.1 B" and formatting.count(9.4) == "9.4"
    assert formatting.duration(3.2) == "3.2 s" and formatting.duration(4000) == "1 h 6 min"


def test_names() -> None:
    assert formatting.short_names(["o/a", "p/a", "q/b"]) == {"o/a": "o/a", "p/a": "p/a", "q/b": "b"}
    assert len(formatting.shortened(LONG, 30)) == 30 and formatting.shortened("short", 30) == "short"
    assert formatting.shortened(LONG, 30).endswith("-v2")
