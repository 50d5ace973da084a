"""From text to ids and pooled positions, in the default mode."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from unmask.checkpoint.tokenizer import TextTokenizer, read_tokenizer
from unmask.encoder.prompts import DefaultPrompts
from unmask.encoder.reference_prompts import SEPARATOR, ReferencePrompts
from unmask.encoder.templates import Template, template_for
from unmask.errors import EmptyText, InputError, InstructionTooLong, TextTooLong

GOLDEN = Path(__file__).parent.parent / "golden"
LLAMA3 = template_for("meta-llama/Meta-Llama-3-8B-Instruct", {})
MISTRAL = template_for("mistralai/Mistral-7B-Instruct-v0.2", {})
PLAIN = Template()
TEMPLATES = st.sampled_from([PLAIN, LLAMA3, MISTRAL])
SPECIALS = ("</s>", "<s>", "<|eot_id|>", "<|start_header_id|>", "<bos>", SEPARATOR, "[INST]")
# Ordinary characters, and everything that a careless encoder would take for control.
TEXTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPECIALS)), max_size=6).map("".join)


def tokenizer() -> TextTokenizer:
    return read_tokenizer(GOLDEN / "tiny_llama3_instruct")


def test_bos_and_instruction_are_attended_to_and_not_pooled() -> None:
    own = tokenizer()
    prompts = DefaultPrompts(own, PLAIN, 512)
    bare, instructed = prompts.build(["some text"])[0], prompts.build(["some text"], "Find this:")[0]
    assert bare.ids[0] == own.bos_id and bare.pooled == (1, len(bare.ids))
    assert len(instructed.ids) > len(bare.ids)
    pooled = instructed.ids[instructed.pooled[0] :]
    assert own.text.decode(pooled.tolist()).strip() == "some text"


def test_closing_template_tokens_are_pooled_as_the_models_were_trained() -> None:
    own = tokenizer()
    eot = own.text.token_to_id("<|eot_id|>")
    prompt = DefaultPrompts(own, LLAMA3, 512).build(["some text"])[0]
    assert prompt.ids[-1] == eot and prompt.pooled[1] == len(prompt.ids)
    assert own.text.decode(prompt.ids[prompt.pooled[0] : -1].tolist(), skip_special_tokens=False) == "some text"


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama2_chat", "tiny_llama3_instruct", "tiny_mistral_instruct"])
@pytest.mark.parametrize("instruction", ["", "Retrieve semantically similar text."])
def test_ordinary_text_gives_the_reference_ids(name: str, instruction: str) -> None:
    """Both modes read the same tokens wherever the reference is not broken, so trained models keep their vectors.

    What is pooled may differ by a token at the seam, where the reference counts tokens of the text standing alone.
    """
    trained_as = json.loads((GOLDEN / name / "config.json").read_text())["_name_or_path"]
    template = template_for(trained_as, {})
    texts = ["how much protein should a female eat", "日本語の短い文です。", "tabs\tand\nnew\n\nlines", "a"]
    ours = DefaultPrompts(read_tokenizer(GOLDEN / name), template, 512).build(texts, instruction)
    theirs = ReferencePrompts(read_tokenizer(GOLDEN / name), template, 512).build(texts, instruction)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.ids.tolist() == reference.ids.tolist()
        if not instruction and not template.prefix:
            assert mine.pooled == reference.pooled


@settings(max_examples=300)
@given(text=TEXTS, instruction=st.text(max_size=20), template=TEMPLATES, max_length=st.integers(24, 64))
def test_any_text_is_safe(text: str, instruction: str, template: Template, max_length: int) -> None:
    own = tokenizer()
    prompts = DefaultPrompts(own, template, max_length)
    try:
        prompt = prompts.build([text], instruction)[0]
    except EmptyText:
        assert not (text.strip() if template.prefix else text)
        return
    except InstructionTooLong:
        assert instruction
        return
    ids, (start, stop) = prompt.ids.tolist(), prompt.pooled
    assert len(ids) <= max_length
    assert 0 < start < stop == len(ids)
    # No control token but BOS and those of the template.
    fresh = tokenizer()
    controls = {fresh.text.token_to_id(token) for token in SPECIALS} - {None}
    expected = [fresh.bos_id, *fresh.text.encode(template.prefix + template.suffix).ids]
    assert [i for i in ids if i in controls] == [i for i in expected if i in controls]
    assert prompt.full_length == prompts.lengths([text], instruction)[0]


@settings(max_examples=100)
@given(text=st.text(min_size=200, max_size=400), instruction=st.sampled_from(["", "Find:"]), template=TEMPLATES)
def test_truncation_takes_the_text_and_leaves_the_rest(text: str, instruction: str, template: Template) -> None:
    body = text.strip() or "x"
    long, short = DefaultPrompts(tokenizer(), template, 5000), DefaultPrompts(tokenizer(), template, 40)
    whole, cut = long.build([body], instruction)[0], short.build([body], instruction)[0]
    if not cut.truncated:
        assert cut.ids.tolist() == whole.ids.tolist()
        return
    assert len(cut.ids) == 40 and cut.full_length == len(whole.ids)
    assert cut.pooled[0] == whole.pooled[0]
    tokens_left = cut.pooled[0] + 5
    assert cut.ids[:tokens_left].tolist() == whole.ids[:tokens_left].tolist()
    if template is LLAMA3:
        assert cut.ids[-1] == whole.ids[-1]


def test_errors_name_the_input_and_the_limit() -> None:
    prompts = DefaultPrompts(tokenizer(), PLAIN, 10)
    with pytest.raises(EmptyText, match="input 1 is empty") as empty:
        prompts.build(["fine", ""])
    assert empty.value.index == 1
    with pytest.raises(TextTooLong, match="maximum context length is 10 tokens, however you requested") as long:
        prompts.build(["word " * 50], truncate=False)
    assert long.value.index == 0
    with pytest.raises(InstructionTooLong, match="leave no room"):
        prompts.build(["text"], "a very long instruction that fills it all")


def test_native_ids() -> None:
    own = tokenizer()
    prompts = DefaultPrompts(own, LLAMA3, 64)
    words = prompts.build(["some text"], "Find:")[0]
    ids = own.text.encode(" some text").ids
    assert own.bos_id is not None
    given_ids = prompts.build_from_ids([ids, [own.bos_id, *ids]], "Find:")
    assert len(given_ids[0].ids) == len(given_ids[1].ids)
    assert given_ids[0].pooled[1] - given_ids[0].pooled[0] == words.pooled[1] - words.pooled[0]
    with pytest.raises(InputError, match="token id 99999"):
        prompts.build_from_ids([[99999]])
    with pytest.raises(EmptyText):
        prompts.build_from_ids([[]])


def test_reference_quirks() -> None:
    own = read_tokenizer(GOLDEN / "tiny_llama")
    reference = ReferencePrompts(own, PLAIN, 512, doc_max_length=20)
    with pytest.raises(EmptyText, match="padded row"):  # one "word" shrinks to none
        reference.build(["あ" * 300])
    with pytest.raises(EmptyText):
        reference.build([""])
    injected = reference.build([f"left{SEPARATOR}right"])[0]  # the head of the text silently becomes an instruction
    assert "left" not in own.text.decode(injected.ids[injected.pooled[0] :].tolist())
    shortened = reference.build(["one two three four five six seven eight nine ten " * 3])[0]
    assert shortened.truncated and len(shortened.ids) <= 21
    with pytest.raises(TextTooLong):
        reference.build(["word " * 100], truncate=False)


def test_a_template_that_spells_bos_does_not_double_it() -> None:
    own = tokenizer()
    prompt = DefaultPrompts(own, Template(prefix="<s>[INST] ", suffix=" [/INST]"), 64).build(["text"])[0]
    assert prompt.ids.tolist().count(own.bos_id) == 1


def test_a_checkpoint_reads_the_same_after_default_prompts_were_made_from_it() -> None:
    own, untouched = tokenizer(), tokenizer()
    text = "<s>a text</s> with <|eot_id|>"
    DefaultPrompts(own, LLAMA3, 64).build([text])
    assert own.text.encode(text).ids == untouched.text.encode(text).ids
    ours, theirs = (ReferencePrompts(tokens, LLAMA3, 64).build([text])[0] for tokens in (own, untouched))
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.pooled == theirs.pooled


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama3_instruct", "tiny_mistral_instruct", "tiny_gemma"])
def test_the_plain_tokenizer_is_a_copy_that_knows_no_control_token(name: str) -> None:
    own = read_tokenizer(GOLDEN / name)
    copy = Tokenizer.from_str(own.text.to_str())
    copy.encode_special_tokens = True
    for text in ("ordinary words, 日本語\n\ttabs", *SPECIALS, "<s> [INST] <|eot_id|></s> <bos><start_of_turn>"):
        assert own.plain.encode(text, add_special_tokens=False).ids == copy.encode(text, add_special_tokens=False).ids
    assert own.plain is not own.text and not own.text.encode_special_tokens
