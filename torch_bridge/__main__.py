"""`python -m torch_bridge`: the command line."""

from torch_bridge.cli import main

main()
