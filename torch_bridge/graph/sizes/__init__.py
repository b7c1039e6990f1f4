"""Sizes that stay open, and their use in a forward."""
