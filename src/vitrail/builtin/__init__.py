"""Vitrail's own analyses: what each measures, needs, and how it is computed, drawn and reported; no torch.

base          label, prediction and probability, which every study has
heads         which heads matter, and how far they look
regions       which part of a head matters
patterns      what heads look like, and which are alike
objects       which head finds the objects, given masks
patches       which patches interact, and how far
head_windows  how few patches each head needs
windows       the windows that a WinT predicts
tokens        what tokens carry, and what they survive
exciting      what excites neurons

To add a measure: declare it here, compute it in the package of its analysis (a collector), and give it a figure and a
finding; study, command line, report, look, page and documentation follow.
"""

from vitrail.builtin.base import BASE_ANALYSIS
from vitrail.builtin.exciting import EXCITING
from vitrail.builtin.head_windows import HEAD_WINDOWS
from vitrail.builtin.heads import HEADS
from vitrail.builtin.objects import OBJECTS
from vitrail.builtin.patches import PATCHES
from vitrail.builtin.patterns import PATTERNS
from vitrail.builtin.regions import REGIONS
from vitrail.builtin.tokens import TOKENS
from vitrail.builtin.windows import WINDOWS

__all__ = ["BUILT_IN"]

BUILT_IN = (BASE_ANALYSIS, HEADS, REGIONS, PATTERNS, OBJECTS, PATCHES, HEAD_WINDOWS, WINDOWS, TOKENS, EXCITING)
"""In the order of the report; the entry point `vitrail.analyses` of this package."""
