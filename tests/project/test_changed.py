"""`make quick` runs the tests of the rooms that were changed, and tests that import what was changed."""

import pytest

from tests.helpers import changed
from tests.helpers.artifacts import ROOT


@pytest.mark.parametrize(
    ("name", "tests"),
    [
        ("torch_bridge/lowering/rules/conv.py", ["torch_bridge/lowering/rules/test_conv.py"]),
        ("torch_bridge/optimizers/__init__.py", ["torch_bridge/optimizers/test_twins.py"]),
        ("jaxensemble/source/plan/settle.py", ["jaxensemble/source/test_reads.py"]),
        ("tests/helpers/networks/plain.py", ["jaxensemble/source/test_computes.py"]),  # by way of another helper
        ("tests/jaxensemble/test_cli.py", ["jaxensemble/test_cli.py", "jaxensemble/test_imports.py"]),
    ],
)
def test_tests_of_a_changed_file_are_found(name: str, tests: list[str]) -> None:
    found = changed.tests_of([ROOT / name])
    assert {ROOT / "tests" / test for test in tests} <= set(found)
    assert (ROOT / name in found) == (not name.startswith("tests/helpers"))
    assert len(found) < 20, "the tests of one room, not all"


def test_a_change_of_what_all_tests_run_under_runs_them_all() -> None:
    assert len(changed.tests_of([ROOT / "tests" / "conftest.py"])) > 90
