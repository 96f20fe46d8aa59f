"""Windows that a model predicts, next to those that are measured.

collect      predicted windows in a study, compared with measured ones
evaluate     accuracy, area, agreement with a teacher and with measured windows, speed
window_maps  predicted windows of a study layer by layer (no torch)
"""
