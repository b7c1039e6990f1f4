"""Lines of a user's own code."""

import functools
import os
import re
import traceback
from pathlib import Path

import sympy
import torch


def user_line(error: BaseException | None) -> str:
    """` (file.py:12: code)`, the user's line that the exporter tells, or the one that raised."""
    found = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.+)', str(error))
    while error is not None and not found:
        frames = traceback.extract_tb(error.__traceback__)
        found = [(f.filename, f.lineno, f.line) for f in frames if f.line and is_user_file(f.filename)]
        error = error.__cause__ or error.__context__
    own = [entry for entry in found if is_user_file(entry[0])]
    if not own:
        return ""
    file, line, code = own[-1]
    return f" ({Path(file).name}:{line}: {code.strip()})"


@functools.cache
def is_user_file(file: str) -> bool:
    """Whether a file is none of PyTorch, what it computes sizes with, this package and Python itself."""
    files = (torch.__file__, sympy.__file__, os.__file__)
    *others, python = (f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], *(Path(f).parent for f in files)))
    foreign = (*others, "<eval_with_key>", "<string>")  # of graphs that PyTorch runs, and of classes it makes
    return not file.startswith(foreign) and (not file.startswith(python) or "site-packages" in file)
