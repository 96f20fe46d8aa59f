"""Names of measures whose values are exact on a sample of the images. Imports nothing: declarations need them."""

__all__ = ["EXACT_VALUES"]

EXACT_VALUES = {"head_probability": "head_probability_exact", "head_loss_change": "head_loss_change_exact"}
"""By measures that a study may hold estimates of: the measure of their exact values on a sample of the images."""
