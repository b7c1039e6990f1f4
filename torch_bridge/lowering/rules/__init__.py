"""Rules from PyTorch's operations to Flax layers and JAX calls, one file for each family."""
