"""`python -m jaxensemble`: the command line."""

from jaxensemble.cli import main

main()
