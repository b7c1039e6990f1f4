"""How fast ensembles run beside PyTorch, and what porting costs."""
