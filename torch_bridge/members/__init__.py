"""The members of a PyTorch ensemble, and their tensors as one stack."""
