"""`unmask providers` against real servers: one with the right vectors, one that pools another way."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.live import KEY, running


def printed_rows(stdout: str) -> list[dict[str, Any]]:
    """The JSON that a command printed, behind log lines of the servers in this process."""
    return json.loads(stdout[stdout.index("[\n") :])


def test_check_tells_right_from_wrong_and_from_silent(
    golden_dir: Path, copied, tmp_path: Path, unmask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_KEY", KEY)
    impostor = copied("tiny_llama")
    (impostor / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "last_token"}))
    with running(golden_dir / "tiny_llama") as good, running(impostor) as bad:
        gone = "http://127.0.0.1:1/v1"
        urls = {"good": f"{good.url}/v1", "bad": f"{bad.url}/v1", "gone": gone}
        (tmp_path / "providers.toml").write_text(
            "".join(
                f'[[provider]]\nname = "{name}"\nkind = "unmask"\nurl = "{url}"\nprivate = true\nkey_env = "PEER_KEY"\n'
                '[[provider.model]]\nid = "tiny_llama"\ncost = "0.004"\n'
                for name, url in urls.items()
            )
        )
        options = ["--providers", str(tmp_path / "providers.toml")]
        listed = unmask("providers", "list", *options, "--json")
        assert [(row["provider"], row["dollars"]) for row in printed_rows(listed.stdout)] == [
            (name, "0.004") for name in urls
        ]
        options += ["--weights", str(golden_dir / "tiny_llama"), "--database", f"sqlite:///{tmp_path / 'c.sqlite'}"]
        assert unmask("accounts", "price", "*", "0.008", *options[-2:]).returncode == 0  # begins the database
        checked = unmask("providers", "check", *options, "--json")
        assert checked.returncode == 2, checked.stderr
        right, pooled, silent = printed_rows(checked.stdout)
        assert right["passed"] and right["finding"]["precision"] == "exact" and right["finding"]["worst"] < 1e-9
        assert pooled["sentence"] == "bad pools the last token; the model pools the mean" and not pooled["passed"]
        assert silent["finding"] is None and silent["sentence"].startswith("gone cannot be connected to")
        one = unmask("providers", "check", "good", *options)
        assert one.returncode == 0 and "right" in one.stdout and KEY not in one.stdout + one.stderr
        assert "no provider 'other'" in unmask("providers", "check", "other", *options).stderr
