"""Sizes that stay open, and what a forward does with them."""
