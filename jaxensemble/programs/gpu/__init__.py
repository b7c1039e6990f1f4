"""Forms of JAX's operations that suit GPUs."""
