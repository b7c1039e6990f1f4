"""Trials of the proof: random networks that must pass it, and planted errors that must not."""
