"""How an error of the project has to be."""

from collections.abc import Callable

import pytest

from jaxensemble.errors import FIRST, LINES, JaxEnsembleError


def refusal(call: Callable[[], object]) -> JaxEnsembleError:
    """The error of a call: of the project's own family, its first line and all of it short, the rest in details."""
    with pytest.raises(JaxEnsembleError) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert lines and 0 < len(lines[0]) <= FIRST and len(lines) <= LINES
    assert lines[0].split(" ...")[0][:40] in caught.value.details
    return caught.value
