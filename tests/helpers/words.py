"""Words that make sentences hard to read. `python -m tests.helpers.words [path ...]` lists them."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.artifacts import ROOT

QUESTIONS = frozenset("What Whether How Which Where When Who Whose Why Whatever Whoever That Those Such As".split())
"""Words that no docstring begins with: it begins with a verb, or with the noun that is returned."""

HARD = re.compile(
    r"\b(anew|told|untold|but for|taken apart|as of|whoever|in the place of|thereof|hence|whilst|amongst|todo|fixme)\b",
    re.IGNORECASE,
)
"""Words for which there are usual ones: again, says, except, split, for example, the caller, instead of."""

GENERATED = ("golden", "saved")


def sources(*folders: str) -> list[Path]:
    """The Python files of some folders, those left out that are generated."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in paths if not set(GENERATED) & set(path.parts)]


def hard_words(path: Path) -> list[str]:
    """The places in a file with such words: `file:line: word`."""
    text = path.read_text("utf-8")
    found = questions(text) + [place for line, part in prose(text) for place in _hard(line, part)]
    return [f"{path.relative_to(ROOT)}:{place}" for place in found]


def questions(source: str) -> list[str]:
    """The docstrings that begin with a question: `line: word`."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    words = [(node, re.match(r"\w+", ast.get_docstring(node) or "")) for node in nodes]
    return [
        f"{getattr(node, 'lineno', 1)}: a docstring begins with {word.group()!r}"
        for node, word in words
        if word and word.group() in QUESTIONS
    ]


def prose(source: str) -> Iterator[tuple[int, str]]:
    """The comments and strings of a source, docstrings among them, each with its line."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            yield token.start[0], token.string


def _hard(line: int, text: str) -> Iterator[str]:
    flat = re.sub(r"\s+", " ", text)
    for found in HARD.finditer(flat):
        yield f"{line}: {found.group()!r} in ...{flat[max(0, found.start() - 30) : found.end() + 30]}..."


if __name__ == "__main__":
    given = [Path(name).resolve() for name in sys.argv[1:]]
    files = [file for path in given for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    for file in files or sources("jaxensemble", "torch_bridge"):
        sys.stdout.writelines(f"{place}\n" for place in hard_words(file))
