"""Parity: proofs that a ported ensemble gives what PyTorch gives."""

from torch_bridge.parity.check import check
from torch_bridge.parity.result import ParityReport, Row

__all__ = ["ParityReport", "Row", "check"]
