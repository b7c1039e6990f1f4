"""The order in which dimensions are stored, decided for a whole graph."""
