"""The names of `torch.func`, for Flax modules."""
