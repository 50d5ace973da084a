"""The table of capabilities: every rule can apply, and a verdict gives the worst with its reason."""

from pathlib import Path

import pytest

from unmask.checkpoint import open_checkpoint
from unmask.export.capabilities import RULES, Level, Target, describe_model, judge, traits_of

VERDICTS: dict[str, dict[Target, Level]] = {
    "tiny_llama": {"hub": "exact", "onnx": "exact", "gguf": "inexact"},
    "tiny_gemma": {"hub": "exact", "onnx": "exact", "gguf": "inexact"},
    "tiny_llama3_instruct": {"hub": "exact", "onnx": "exact", "gguf": "impossible"},
    "tiny_mistral_instruct": {"hub": "impossible", "onnx": "exact", "gguf": "impossible"},
    "tiny_llama2_chat": {"hub": "impossible", "onnx": "exact", "gguf": "impossible"},
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_on_the_golden_models(golden_dir: Path, name: str) -> None:
    traits = traits_of(describe_model(open_checkpoint(golden_dir / name), {"query": "Find it:"}))
    verdicts = {target: judge(target, traits) for target in VERDICTS[name]}
    assert {target: verdict.level for target, verdict in verdicts.items()} == VERDICTS[name]
    for verdict in verdicts.values():
        assert bool(verdict.reasons) == (verdict.level != "exact")
        assert verdict.sentences()[0].startswith(f"{verdict.target}: {verdict.level}")


def test_each_rule_is_decided_by_its_trait_alone() -> None:
    for rule in RULES:
        verdict = judge(rule.target, frozenset({rule.trait}))
        assert verdict.level == rule.level
        if rule.exception is None:
            assert verdict.reasons == (f"{rule.trait}: {rule.reason}",)
        else:
            assert verdict.exceptions[rule.exception] == rule.reason
    assert len({(rule.target, rule.trait) for rule in RULES}) == len(RULES)
