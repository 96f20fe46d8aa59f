"""Two studies of the same images: what differs between two models, or between one model before and after.

pairs       the images that both studies have, found by what is in the files, and what the two models share
align       one measure of both studies on common cells, whatever the numbers of layers and heads
compare     paired differences of every measure, with intervals and a null
"""

from vitrail.comparison.compare import compare
from vitrail.comparison.pairs import Pair, open_pair

__all__ = ["Pair", "compare", "open_pair"]
