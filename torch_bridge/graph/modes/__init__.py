"""Training and evaluation mode of modules, and their two graphs."""
