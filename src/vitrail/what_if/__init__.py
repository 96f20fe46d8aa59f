"""What one image's answer becomes if something in the model or in the image is changed.

    changed = vit.what_if(image, heads_off="L2H0,L3H1")
    changed["top_probability"]        # after nothing, after L2H0 is off, after both are

Changes add up in the order patches, windows, heads: step 0 is the model as it is, each further step adds one change.
Heads are switched off and masked as everywhere (`vitrail.tap.edits`), so every step equals a pass with those edits.
"""

from vitrail.what_if.arrays import ARRAYS
from vitrail.what_if.changes import HOW, HeadOff, WindowMove
from vitrail.what_if.steps import what_if

__all__ = ["ARRAYS", "HOW", "HeadOff", "WindowMove", "what_if"]
