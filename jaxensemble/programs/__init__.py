"""Traced JAX programs, read and rewritten."""
