"""Forwards that take derivatives, or have gradients of their own."""
