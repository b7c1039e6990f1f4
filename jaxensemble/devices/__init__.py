"""Meshes of devices, over which the members of an ensemble lie."""
