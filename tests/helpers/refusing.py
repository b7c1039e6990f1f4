"""Checks of the project's errors."""

from collections.abc import Callable

import pytest

from jaxensemble.errors import FIRST, LINES, JaxEnsembleError


def refusal(call: Callable[[], object]) -> JaxEnsembleError:
    """Returns the error of a call, after checking its family, its length, and its details."""
    with pytest.raises(JaxEnsembleError) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert lines and 0 < len(lines[0]) <= FIRST and len(lines) <= LINES
    assert lines[0].split(" ...")[0][:40] in caught.value.details
    return caught.value
