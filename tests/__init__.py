"""Tests: `jaxensemble` needs no PyTorch, `torch_bridge` does, `project` is about the repository as a whole."""
