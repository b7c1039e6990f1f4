"""Lines of a user's own code."""

import functools
import os
import re
import traceback
from pathlib import Path

import sympy
import torch


def user_line(error: BaseException | None) -> str:
    """Returns ` (file.py:12: code)` for the user's line that the exporter names or that raised; empty if none did."""
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
    """Returns whether a file is not part of PyTorch, sympy, this package or Python itself."""
    files = (torch.__file__, sympy.__file__, os.__file__)
    *others, python = (f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], *(Path(f).parent for f in files)))
    foreign = (*others, "<eval_with_key>", "<string>")  # graphs that PyTorch runs, and classes that it makes
    return not file.startswith(foreign) and (not file.startswith(python) or "site-packages" in file)
