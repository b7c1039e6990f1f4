"""From PyTorch to JAX: port an ensemble, and prove that it agrees with what PyTorch computes."""
