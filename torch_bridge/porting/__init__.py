"""PyTorch modules to Flax modules and ensembles."""
