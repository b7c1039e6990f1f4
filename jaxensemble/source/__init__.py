"""A `Network` as readable Flax source. To run a network is to import the source that is printed here.

There is no second interpreter whose behaviour could differ. The text consists of validated names and literals, so a
network from a file cannot smuggle code into the text.
"""

from jaxensemble.source.write.module import Printer, print_source

__all__ = ["Printer", "print_source"]
