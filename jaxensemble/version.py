"""Version of this package."""

import importlib.metadata

try:
    VERSION = importlib.metadata.version("jaxensemble")
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    VERSION = "unknown"
