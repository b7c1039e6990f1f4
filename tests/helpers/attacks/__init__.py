"""Files that nobody should load, made by code: hostile checkpoints, hostile artifacts, and damage to either."""
