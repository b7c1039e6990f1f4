"""What an ensemble keeps of the reports that say it agrees with PyTorch."""

from collections.abc import Sequence

from jaxensemble.network.proof import Comparison, Proof
from torch_bridge.parity.result import WEIGHTS, ParityReport, Row


def proof_of(reports: Sequence[ParityReport]) -> Proof | None:
    """The proof that passed reports make together: of rows with one name, each about some members, the worst.

    None where weights are all that was compared, as of a network that draws random numbers in evaluation mode too.
    """
    if all(row.stage == WEIGHTS for report in reports for row in report.rows):
        return None
    worst: dict[tuple[str, str], Row] = {}
    for row in (row for report in reports for row in report.rows):
        known = worst.get((row.stage, row.case))
        if known is None or _closeness(row) > _closeness(known):
            worst[row.stage, row.case] = row
    environment = reports[0].environment
    rows = (Comparison(row.stage, row.case, float(row.error), float(row.limit)) for row in worst.values())
    return Proof(
        environment["date"], dict(environment["versions"]), tuple(rows), x64=any(report.x64 for report in reports)
    )


def _closeness(row: Row) -> float:
    """How near to its limit an error is, which may be zero where nothing but equality passes."""
    return row.error / row.limit if row.limit else row.error
