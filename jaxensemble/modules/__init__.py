"""Flax modules, split into structure and arrays, and merged."""
