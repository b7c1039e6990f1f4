"""A network as plain data, and the facts known about it."""
