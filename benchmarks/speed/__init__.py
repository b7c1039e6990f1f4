"""Speed of ensembles next to PyTorch, and the cost of porting."""
