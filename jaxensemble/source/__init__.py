"""A `Network` as readable Flax source. Running a network is importing the source printed here.

There is no interpreter beside it whose behaviour could differ. The text is made of validated names and literals alone,
so a network that comes from a file cannot smuggle code into it.
"""

from jaxensemble.source.write.module import Printer, print_source

__all__ = ["Printer", "print_source"]
