"""Forwards that take derivatives, or that define gradients of their own."""
