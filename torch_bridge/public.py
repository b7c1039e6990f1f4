"""The public names of `torch_bridge`."""

from torch_bridge.checkpoints import load_ensemble as load_ensemble
from torch_bridge.lowering import register as register
from torch_bridge.members.stack import to_torch as to_torch
from torch_bridge.optimizers import optimizer as optimizer
from torch_bridge.optimizers import train_state as train_state
from torch_bridge.parity import ParityReport as ParityReport
from torch_bridge.parity import check as check
from torch_bridge.porting.port import to_ensemble as to_ensemble
from torch_bridge.porting.port import to_flax as to_flax
from torch_bridge.state_dicts import stack_state_dicts as stack_state_dicts
from torch_bridge.timing import TimingReport as TimingReport
from torch_bridge.timing import time as time
