"""Sources and documents keep to plain words: `tests/helpers/words.py` lists those that are hard."""

from pathlib import Path

import pytest

from tests.helpers import words
from tests.helpers.artifacts import ROOT

FOLDERS = ("jaxensemble", "torch_bridge", "benchmarks", "examples")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
QUOTING = {"CHANGELOG.md", "coverage.md"}  # which keep the words of earlier days, and of recorded errors


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_have_no_hard_words(folder: str) -> None:
    paths = words.sources(folder)
    assert paths
    assert [place for path in paths for place in words.hard_words(path)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in QUOTING], ids=lambda page: page.name)
def test_documents_have_no_hard_words(page: Path) -> None:
    assert [found.group() for found in words.HARD.finditer(page.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('def f():\n    """What it gives."""', ["1: a docstring begins with 'What'"]),
        ('"""Whether a module is one."""', ["1: a docstring begins with 'Whether'"]),
        ('class A:\n    """A noun."""\n    def f(self):\n        """Returns whether it is one."""', []),
        ("x = 1  # computed anew", ["1: 'anew' in ...# computed anew..."]),
        ("x = 'the caller is\\n told'", ["1: 'told' in ...'the caller is\\n told'..."]),
        ('"""TODO"""', ['1: \'TODO\' in ..."""TODO"""...']),
        ("told = untold_number", []),
    ],
)
def test_planted_words_are_found(
    tmp_path: Path, source: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "ROOT", tmp_path)
    path = tmp_path / "planted.py"
    path.write_text(source)
    assert words.hard_words(path) == [f"planted.py:{place}" for place in found]
