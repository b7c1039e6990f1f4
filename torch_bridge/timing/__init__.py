"""Time of a ported ensemble compared with every way that PyTorch has of running the same work."""

from torch_bridge.timing.result import Ratio as Ratio
from torch_bridge.timing.result import TimingReport as TimingReport
from torch_bridge.timing.result import Variant as Variant
from torch_bridge.timing.run import time as time
from torch_bridge.timing.side_by_side import side_by_side as side_by_side
