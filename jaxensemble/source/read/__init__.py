"""The way from a network's calls to the steps of its modules."""
