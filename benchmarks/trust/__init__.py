"""How far the proof can be believed: random networks that must pass it, and planted errors that must not."""
