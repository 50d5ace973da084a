"""The file of providers: its fields, and errors that name file and key."""

from datetime import date
from pathlib import Path

import pytest

from unmask.errors import UsageError
from unmask.router.checks import ModelSource
from unmask.router.pool import ProviderPool
from unmask.router.providers import read_providers
from unmask.router.retry_budget import LIFE_S, RESERVE_PER_S

GOOD = """
[[provider]]
name = "gpu-2"
kind = "unmask"
url = "http://gpu-2:8080/v1"
private = true

[[provider.model]]
id = "org/name"
precision = "bfloat16"

[[provider]]
name = "acme"
kind = "tei"
url = "https://api.acme.example"
key_env = "ACME_KEY"
data = "30d"
country = "DE"

[[provider.model]]
id = "org/name"
remote = "name-v1"
cost = [{ from = 2026-01-01, usd = "0.010" }, { from = 2026-11-01, usd = "0.012" }]
max_tokens = 512
priority = 1

[[provider.model]]
id = "org/other"
cost = "0.002"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "providers.toml"
    file.write_text(text)
    return file


def test_a_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_KEY", "secret-of-acme")
    parsed = read_providers(written(tmp_path, GOOD))
    assert parsed.keys() == ("secret-of-acme",) and "secret-of-acme" not in repr(parsed)
    (ours, first), (acme, second) = parsed.of_model("org/name")
    assert (ours.name, first.name_there, first.precision_class) == ("gpu-2", "org/name", "bfloat16")
    assert (acme.country, acme.data, second.name_there, second.precision_class) == ("DE", "30d", "name-v1", "float16")
    assert ours.inputs_per_request(first) == 2048 and acme.inputs_per_request(second) == 32
    assert ours.takes_instructions and not acme.takes_instructions
    costs = [second.cost_on(date(year, month, 1)) for year, month in ((2025, 12), (2026, 1), (2026, 10), (2026, 11))]
    assert costs == [0, 10_000_000, 10_000_000, 12_000_000]
    assert parsed.of_model("org/other")[0][1].cost_on(date(2026, 1, 1)) == 2_000_000
    assert parsed.of_model("nobody") == []
    assert read_providers(written(tmp_path, "")).providers == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'kind = "tei"',
            'kind = "cohere"',
            r"provider\[1\].kind \(acme\): invalid enum value 'cohere', expected 'openai', 'tei' or 'unmask'",
        ),
        ('country = "DE"', 'county = "DE"', r"provider\[1\] \(acme\): object contains unknown field `county`"),
        ('id = "org/other"', 'name = "org/other"', r"provider\[1\].model\[1\] \(acme\): object "),
        ('url = "https://api.acme', 'url = "http://api.acme', r"provider\[1\].url \(acme\): it must begin with https"),
        ("private = true", "private = false", r"provider\[0\].url \(gpu-2\): it must begin with https"),
        ("https://api.acme.example", "https://127.0.0.1", r"provider\[1\].url \(acme\): 127.0.0.1 is not a global"),
        ('"ACME_KEY"', '"ACME_KEYS"', r"provider\[1\].key_env \(acme\): the environment variable ACME_KEYS"),
        ('id = "org/other"', 'id = "org/name"', r"provider\[1\].model\[1\].id \(acme\): org/name is named twice"),
        ('usd = "0.012"', 'usd = "cheap"', r"provider\[1\].model\[0\].cost \(acme\): 'cheap' is no amount"),
        ('name = "acme"', 'name = "gpu-2"', r"provider.name: two providers are called 'gpu-2'"),
        ('name = "acme"', 'name = "Acme Inc"', r"provider\[1\].name \(Acme Inc\): expected `str` matching regex"),
        ("priority = 1", "priority = -1", r"provider\[1\].model\[0\].priority \(acme\): expected `int` >= 0"),
        ('data = "30d"', 'data = "30d"\nca_file = "/no/such.pem"', r"provider\[1\].ca_file \(acme\): there is no file"),
        ('data = "30d"', 'client_cert_file = "/no.pem"', r"provider\[1\].client_cert_file \(acme\): there is no file"),
        ('data = "30d"', f'client_key_file = "{__file__}"', r"client_cert_file \(acme\): a certificate needs its key"),
        (
            'data = "30d"',
            f'client_cert_file = "{__file__}"\nclient_key_file = "{__file__}"',
            r"client_key_file \(acme\): .* chmod 600",
        ),
        ('data = "30d"', 'proxy = "http://user:pw@proxy"', r"provider\[1\].proxy \(acme\): "),
        ("[[provider]]", "[[provider", "cannot be read: "),
        ("\n[[provider]]", "retry_tokens = 1.5\n[[provider]]", "retry_tokens: expected `float` <= 1"),
        ("\n[[provider]]", "hedge_tokens = -0.1\n[[provider]]", "hedge_tokens: expected `float` >= 0"),
        ("\n[[provider]]", "canary_every_s = 1\n[[provider]]", "canary_every_s: expected `float` >= 10"),
    ],
)
def test_an_error_names_file_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.setenv("ACME_KEY", "secret-of-acme")
    assert GOOD.count(old) >= 1
    file = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as refused:
        read_providers(file)
    assert str(file) in str(refused.value) and "secret-of-acme" not in str(refused.value)


async def test_budgets_and_canaries_follow_the_file(tmp_path: Path) -> None:
    good = written(tmp_path, GOOD.replace('key_env = "ACME_KEY"\n', ""))
    pool = ProviderPool(good, lambda model: ModelSource("/nowhere"))
    assert (pool.settings.retry_tokens, pool.settings.hedge_tokens) == (0.1, 0.05)
    assert (pool._pace.busy, pool._pace.idle) == (60, 600)
    good.write_text("retry_tokens = 0.5\nhedge_tokens = 0.25\ncanary_every_s = 900\n" + good.read_text())
    pool.reload()
    try:
        assert (pool._pace.busy, pool._pace.idle) == (900, 900)
        model = pool.models()["org/name"]
        model.budget.deposit(10**6, 0)
        model.hedge_budget.deposit(10**6, 0)
        assert model.budget.covers(500_000, 0) and model.hedge_budget.covers(250_000, 0)
        assert not model.hedge_budget.covers(250_001, 0)
        assert not model.budget.covers(500_001 + round(RESERVE_PER_S * LIFE_S), 0)
    finally:
        await pool.close()


def test_a_key_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("sk-of-acme\n")
    key_file.chmod(0o640)
    file = written(tmp_path, GOOD.replace('key_env = "ACME_KEY"', f'key_file = "{key_file}"'))
    with pytest.raises(UsageError, match=r"key_file \(acme\): .* chmod 600"):
        read_providers(file)
    key_file.chmod(0o600)
    assert read_providers(file).keys() == ("sk-of-acme",)
    key_file.write_text("two words")
    with pytest.raises(UsageError, match="empty or has blanks") as refused:
        read_providers(file)
    assert "two words" not in str(refused.value)


def test_byte_order_marks_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-of-acme\n", encoding="utf-8-sig")
    (tmp_path / "key").chmod(0o600)
    file = written(tmp_path, GOOD.replace('key_env = "ACME_KEY"', f'key_file = "{tmp_path / "key"}"'))
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert read_providers(file).keys() == ("sk-of-acme",)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"providers.toml cannot be read"):
        read_providers(tmp_path / "providers.toml")
