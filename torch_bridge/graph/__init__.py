"""A module's forward as a graph of operations, captured by `torch.export`."""
