"""The text of single tokens, with real tokenizers trained here."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from critic_train.report.report_sources import read_sources
from critic_train.report.rollout_pages import decoder_of, token_texts

TEXT = "Sum 12 and 30: the naïve answer is 42 🎉, 値は四十二。\n\n  two  spaces\tand a tab"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the answer is the sum of two and two"] * 9, trainer)
    return tokenizer


def sentence_like() -> Tokenizer:
    """Metaspace with byte fallback, as SentencePiece models are converted."""
    vocabulary = {"<unk>": 0, "<|end|>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for piece in ("▁", "▁the", "▁answer", "s", "u", "m", "t", "h", "e"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


@pytest.fixture(params=[byte_level, sentence_like], ids=["byte-level", "sentence-like"])
def tokenizer(request) -> Tokenizer:
    return request.param()


def test_the_pieces_are_the_text(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    found = token_texts(ids, lambda some: tokenizer.decode(list(some), skip_special_tokens=False))
    assert len(found) == len(ids) > 40
    assert "".join(found) == tokenizer.decode(ids) == TEXT
    assert "\ufffd" not in "".join(found)


def test_a_character_of_several_tokens_stands_at_its_last(tokenizer):
    ids = tokenizer.encode("x🎉y").ids
    found = token_texts(ids, lambda some: tokenizer.decode(list(some), skip_special_tokens=False))
    assert "".join(found) == "x🎉y"
    assert found[-2].endswith("🎉")
    assert found.count("") >= 2


def test_bytes_that_are_no_text_do_not_swallow_what_follows():
    tokenizer = byte_level()
    broken = [tokenizer.token_to_id("ð")] * 5 + tokenizer.encode("the sum").ids
    found = token_texts(broken, lambda some: tokenizer.decode(list(some), skip_special_tokens=False))
    assert "".join(found).endswith("the sum")
    assert found[-1] != ""


def test_a_rollout_that_ends_inside_a_character():
    tokenizer = byte_level()
    ids = tokenizer.encode("so 🎉").ids[:-1]
    found = token_texts(ids, lambda some: tokenizer.decode(list(some), skip_special_tokens=False))
    assert "".join(found).startswith("so ")
    assert len(found) == len(ids)


def test_special_tokens_are_shown():
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<|end|>")
    found = token_texts(
        [end, *tokenizer.encode("the").ids], lambda some: tokenizer.decode(list(some), skip_special_tokens=False)
    )
    assert found[0] == "<|end|>"


def test_without_a_tokenizer_tokens_are_numbers():
    assert token_texts([7, 12], None) == [" 7", " 12"]


def test_the_tokenizer_is_found_where_it_stands(make_run, tmp_path):
    run = make_run("a", steps=1, model=str(tmp_path / "base"))
    [source] = read_sources([str(run)])
    assert decoder_of(source) is None
    base = tmp_path / "base"
    base.mkdir()
    ids = byte_level().encode("the sum").ids
    (base / "tokenizer.json").write_text("{}")
    assert decoder_of(source) is None, "a file that is no tokenizer is none"
    byte_level().save(str(base / "tokenizer.json"))
    decode = decoder_of(source)
    assert decode is not None
    assert decode(ids) == "the sum"
    own = run / "checkpoints" / "step-00000004"
    own.mkdir(parents=True)
    sentence_like().save(str(own / "tokenizer.json"))
    decode = decoder_of(source)
    assert decode is not None
    assert decode([2 + ord("x")]) == "x", "the critic's own comes before that of the model it began from"
    decode = decoder_of(source, str(base))
    assert decode is not None
    assert decode(ids) == "the sum"


def test_rollouts_are_shown_in_words(make_run, tmp_path):
    from critic_train.report.page import render

    run = make_run("a", steps=4)
    evaluation = json.loads((run / "evaluation.json").read_text())
    ids = byte_level().encode("the answer & <b>42</b> 🎉").ids
    for example in evaluation["examples"]:
        example["input_ids"] = ids
        for key in ("values", "returns", "old_values"):
            example[key] = [0.5] * len(ids)
        example["response_mask"] = [False] + [True] * (len(ids) - 1)
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    folder = Path(tmp_path / "tokenizer")
    folder.mkdir()
    byte_level().save(str(folder / "tokenizer.json"))
    html = render(read_sources([str(run)]), tokenizer=str(folder))
    assert "<b>42" not in html
    assert "token ids" not in html
    assert "🎉</span>" in html
    assert 'title="value 0.500, return 0.500, old value 0.500"' in html
