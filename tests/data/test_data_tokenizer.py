"""The tokenizer loses nothing: text to ids and back, for any text and for foreign models."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from sip_engine.data.tokenizer import Tokenizer
from sip_engine.utils.errors import DataError

CORPUS = [
    "the cat sat on the mat.\n\nthe dog sat on the log.  the end\n" * 20,
    "def main():\n    return 12 + 345\n\tpass\n" * 10,
    "Ünïcödé is the text of the world: äöü 漢字\n" * 10,
]
TRAPS = "\u2581\u2585\u2047\ufffd\ufeff \n\t\r\0<>/s0Aunk\u0301\u3000\ufb01"
ANY_TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(TRAPS), st.sampled_from("the cat"))
)


def sentencepiece_model(**options: object) -> bytes:
    """A model trained by the library itself, with its own defaults where `options` says nothing."""
    model = BytesIO()
    lines = iter([line for text in CORPUS for line in text.split("\n") if line])
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2, **options}
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, hard_vocab_limit=False, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train(CORPUS, 340, tmp_path_factory.mktemp("tokenizer") / "bpe.model")


@pytest.fixture(scope="module")
def foreign() -> dict[str, Tokenizer]:
    models = {
        "dummy prefix": sentencepiece_model(normalization_rule_name="identity"),
        "newline piece": sentencepiece_model(
            normalization_rule_name="identity", user_defined_symbols=["\n\n", "t\nh"]
        ),
        "unigram": sentencepiece_model(normalization_rule_name="identity", model_type="unigram"),
    }
    return {name: Tokenizer(model) for name, model in models.items()}


@given(ANY_TEXT)
@example("\u2581")
@example(" \u2581 \n\u2581\n")
@example("  two  spaces \n\n\n and a tab\t\t ")
@example("<s></s><unk><0x41>")
@example("\0")
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


@given(ANY_TEXT)
def test_foreign_models_lose_nothing_either(foreign: dict[str, Tokenizer], text: str) -> None:
    for name, tokenizer in foreign.items():
        assert tokenizer.decode(tokenizer.encode(text)) == text, name


@given(ANY_TEXT)
def test_text_decodes_piece_by_piece(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for split in range(len(ids) + 1):
        left, right = tokenizer.decode(ids[:split]), tokenizer.decode(ids[split:])
        is_inside_a_character = left.endswith("\ufffd") and right.startswith("\ufffd")
        assert left + right == text or is_inside_a_character


def test_ascii_text_can_be_split_anywhere(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(CORPUS[1])
    for split in range(len(ids) + 1):
        assert tokenizer.decode(ids[:split]) + tokenizer.decode(ids[split:]) == CORPUS[1]


@given(st.lists(ANY_TEXT, max_size=5), st.integers(1, 3))
def test_a_batch_encodes_like_its_texts(tokenizer: Tokenizer, texts: list[str], num_threads: int) -> None:
    batch = tokenizer.encode_batch(texts, num_threads)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]


@given(st.text(alphabet="the catsndog\n \t漢é", max_size=60))
def test_ids_are_those_of_the_library_on_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    reference = SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.encode(text).tolist() == reference.encode(text, out_type=int)


def test_pieces_with_newlines_are_used(foreign: dict[str, Tokenizer]) -> None:
    tokenizer = foreign["newline piece"]
    reference = SentencePieceProcessor(model_proto=tokenizer.model)
    pieces = [reference.id_to_piece(token) for token in tokenizer.encode("a\n\ns\nt\nh\u2581\n\n").tolist()]
    assert pieces == ["a", "\n\n", "s", "<0x0A>", "t\nh", "<0xE2>", "<0x96>", "<0x81>", "\n\n"]


def test_a_corpus_without_spaces_still_gives_a_lossless_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["abcabc"] * 10, 264, tmp_path / "a.model")
    assert tokenizer.decode(tokenizer.encode("a b \u2581")) == "a b \u2581"


def test_frequent_words_are_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode(" the the the")) == 3
    assert len(tokenizer.encode("\n")) == 1


def test_control_ids_come_from_no_text_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    unknown = SentencePieceProcessor(model_proto=tokenizer.model).unk_id()
    control = {tokenizer.bos_id, tokenizer.eos_id, unknown}
    assert len(control) == 3
    assert control.isdisjoint(tokenizer.encode("<s> </s> <unk> \u2047 <pad>").tolist())
    around = [tokenizer.bos_id, *tokenizer.encode("a b").tolist(), unknown, tokenizer.eos_id]
    assert tokenizer.decode(around) == "a b"


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:2]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 340])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, bad: int) -> None:
    assert tokenizer.vocab_size == 340
    with pytest.raises(DataError, match=f"token id {bad} is not in this vocabulary of 340"):
        tokenizer.decode([5, bad])


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        tokenizer.encode("a\ud800b")


def test_training_is_deterministic_quiet_and_the_file_is_the_tokenizer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = Tokenizer.train(CORPUS, 340, tmp_path / "new folder" / "a.model")
    again = Tokenizer.train(CORPUS, 340, tmp_path / "b.model")
    other = Tokenizer.train([text.upper() for text in CORPUS], 340, tmp_path / "c.model")
    loaded = Tokenizer.load(tmp_path / "new folder" / "a.model")
    assert first.fingerprint == again.fingerprint == loaded.fingerprint != other.fingerprint
    assert loaded.encode(CORPUS[0]).tolist() == first.encode(CORPUS[0]).tolist()
    assert capfd.readouterr() == ("", "")


def test_only_the_first_bytes_are_trained_on(tmp_path: Path) -> None:
    text = "the cat sat on the mat " * 4
    short = Tokenizer.train([text], 275, tmp_path / "a.model")
    cut = Tokenizer.train([text, "zebra " * 40], 275, tmp_path / "b.model", max_bytes=len(text))
    assert cut.fingerprint == short.fingerprint


def test_lines_with_the_trainers_own_characters_are_trained_on(tmp_path: Path) -> None:
    plain = Tokenizer.train(["abcabc", "abc"] * 10, 265, tmp_path / "a.model")
    trap = Tokenizer.train(["abcabc\u2585abc\u2581\t\0"] * 10, 265, tmp_path / "b.model")
    assert len(plain.encode("abc")) == len(trap.encode("abc")) == 1


def limit_named(error: pytest.ExceptionInfo[DataError], rule: str) -> int:
    text, _, number = str(error.value).rpartition(" ")
    assert text.endswith(rule)
    return int(number)


def test_a_vocabulary_that_does_not_fit_names_the_one_that_does(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        Tokenizer.train(CORPUS, 32000, tmp_path / "a.model")
    assert str(error.value).startswith("vocab_size 32000 is more than this text can fill; use at most ")
    largest = limit_named(error, "use at most")
    assert Tokenizer.train(CORPUS, largest, tmp_path / "b.model").vocab_size == largest

    with pytest.raises(DataError) as error:
        Tokenizer.train(CORPUS, 100, tmp_path / "a.model")
    assert str(error.value).startswith("vocab_size 100 cannot hold this text's characters; use at least ")
    smallest = limit_named(error, "use at least")
    assert Tokenizer.train(CORPUS, smallest, tmp_path / "c.model").vocab_size == smallest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.model", "c.model"]


@pytest.mark.parametrize("texts", [[], ["", "\n\n\t"]])
def test_no_text_to_train_on(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        Tokenizer.train(texts, 300, tmp_path / "a.model")


def test_an_error_of_the_input_comes_through(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield CORPUS[0]
        raise DataError("corpus.gz: damaged")

    with pytest.raises(DataError, match=r"^corpus\.gz: damaged$"):
        Tokenizer.train(texts(), 300, tmp_path / "a.model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        tokenizer.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (b"", "not a sentencepiece model, or damaged"),
        (b"garbage", "not a sentencepiece model, or damaged"),
        (sentencepiece_model(), "changes text; train it with normalization_rule_name=identity"),
        (
            sentencepiece_model(normalization_rule_name="identity", byte_fallback=False, vocab_size=90),
            "no byte fallback; train it with byte_fallback",
        ),
        (sentencepiece_model(normalization_rule_name="identity", eos_id=-1), "no bos or no eos"),
    ],
    ids=["empty", "garbage", "normalising", "no bytes", "no eos"],
)
def test_models_that_cannot_be_used_are_refused(tmp_path: Path, model: bytes, rule: str) -> None:
    path = tmp_path / "foreign.model"
    path.write_bytes(model)
    with pytest.raises(DataError) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert rule in str(error.value)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "none.model")
