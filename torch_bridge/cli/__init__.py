"""`torch-bridge`: port, check, time, print the source, and the demo, from the command line."""

from torch_bridge.cli.commands import app as app
from torch_bridge.cli.commands import main as main
