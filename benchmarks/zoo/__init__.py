"""Whole libraries of networks, each ported and proved in a process of its own. `make zoo` runs it."""
