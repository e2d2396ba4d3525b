"""The text that `sip real` gathers from the machine: prose told from code, each once, and what is held out is new."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sip_engine.experiments.real import texts
from sip_engine.utils.errors import DataError

PROSE = (
    "The result of this function is an array that holds the sum of the values in the given order, and it is "
    "the same for all of them if the input is not changed by another caller. "
)


def test_prose_is_told_from_code_and_tables() -> None:
    assert texts.is_prose(PROSE)
    assert not texts.is_prose("x = [1, 2, 3]\n" * 40)
    assert not texts.is_prose("lorem ipsum dolor sit amet consectetur adipiscing elit " * 10)
    assert not texts.is_prose("the of a")


def test_a_source_takes_each_text_once_and_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_MOST_CHARS", 2500)
    long = ["a" * 900, "b" * 900, "a" * 900, "c" * 100, "d" * 900, "e" * 900]
    source = texts.Source("some", "1", "none").take((f"f{n}", text) for n, text in enumerate(long))
    assert [text[0] for _, text in source.texts] == ["a", "b", "d"]
    assert (source.documents, source.chars) == (3, 2700)
    assert source.texts[0][0] == "some/f0"


def test_docstrings_are_read_without_running_anything(tmp_path: Path) -> None:
    text = PROSE * 6
    package = tmp_path / "package"
    (package / "tests").mkdir(parents=True)
    (package / "a.py").write_text(f'raise SystemExit\ndef f():\n    """{text}"""\n')
    (package / "broken.py").write_text("def f(:\n")
    (package / "tests" / "b.py").write_text(f'"""{PROSE * 7}"""\n')
    assert list(texts._docstrings(package)) == [("a.py", text.strip())]


def test_what_repeats_the_training_text_is_not_held_out() -> None:
    lines = [f"A line of the documentation that is quite long and has the number {n}." for n in range(40)]
    files = [f"package/{n}.py" for n in range(400)]
    held = [file for file in files if texts._hash(file) % 100 < texts._HELD_OUT_OF_100]
    taught = next(file for file in files if file not in held)
    assert len(held) > 2
    documents = [
        (taught, "\n".join(lines[:10])),
        (held[0], "\n".join(lines[10:20])),
        (held[1], "\n".join([*lines[:3], *lines[20:27]])),  # 3 of 10 lines are in the training text
        (held[2], "\n".join([*lines[:2], *lines[30:38]])),  # 2 of 10
    ]
    train_part, held_out = texts.split(documents)
    assert train_part == documents[:1]
    assert held_out == [documents[1], documents[3]]


def test_gathered_text_is_kept_and_too_little_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sources(count: int) -> list[texts.Source]:
        found = texts.Source("numbers", "1", "MIT")
        return [found.take((f"{n}.py", f"{n} " * 900) for n in range(count))]

    monkeypatch.setattr(texts, "_sources", lambda: sources(3))
    with pytest.raises(DataError, match="--text PATH"):
        texts.gather(tmp_path / "text")
    assert not (tmp_path / "text").exists()
    monkeypatch.setattr(texts, "_MOST_CHARS", 10**9)
    monkeypatch.setattr(texts, "_sources", lambda: sources(300))
    about = texts.gather(tmp_path / "text")
    assert about[0]["licence"] == "MIT" and about[0]["documents"] == 300
    rows = [
        json.loads(line)["text"]
        for name in (texts.TRAIN, texts.HELD_OUT)
        for line in (tmp_path / "text" / name).read_text().splitlines()
    ]
    assert sorted(rows) == sorted(f"{n} " * 900 for n in range(300))
    monkeypatch.setattr(texts, "_sources", lambda: pytest.fail("gathered again"))
    assert texts.gather(tmp_path / "text") == about


def test_paragraphs_of_a_manual(tmp_path: Path) -> None:
    (tmp_path / "ch1.html").write_text(
        "<html><script>no</script><h1>no</h1><p>One <b>bold</b>\n word.</p><p> </p><div><p>Two &amp; more.</p></div>"
    )
    assert list(texts._manual(tmp_path)) == [("ch1.html", "One bold word.\n\nTwo & more.")]


def test_licences_are_read_paragraph_by_paragraph_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, ours = (
        PROSE * 5,
        "You may do with this as you like if the name of it is kept in all of the copies. " * 12,
    )
    folder = tmp_path / "packages" / "one.dist-info" / "licenses"
    folder.mkdir(parents=True)
    (folder / "LICENSE").write_text(f"One\n\n{terms}\n\n{ours}")
    (folder.parent / "LICENCE.txt").write_text(
        f"Two\n \n{terms.upper()}"
    )  # what the other one says, in capitals
    (tmp_path / "packages" / "LICENSE").write_text(ours + terms)  # of no package
    monkeypatch.setattr(texts, "_COMMON_LICENCES", tmp_path / "none")
    monkeypatch.setattr("sys.path", [str(tmp_path / "packages")])
    rows = [json.loads(line) for line in texts.gather_licences(tmp_path / "l.jsonl").open()]
    # The file that comes first, by its path, keeps what both of them say.
    assert [row["text"] for row in rows] == [f"Two\n\n{terms.upper().strip()}", f"One\n\n{ours.strip()}"]
