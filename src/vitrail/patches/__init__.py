"""Patches: which patches interact, in which windows, around which hubs, and which way they are pulled.

interaction  how much each patch takes from each other: the indicators
windows      for each query the box of patches that holds most of it
budget       what a window costs the answer, and how areas are allotted under one budget
head_windows windows of every head under one budget, chosen layer by layer
verify       what becomes of the answer if patches see only what masks leave open
hubs         patches that nearly every query keeps
field        the responsive field: tendency, size, distance, and their nulls
integral     sums over boxes, which windows and fields are found with
collect      the above for a study, from the one plain pass

All formulas are our construction, after Ma et al. 2022 (arXiv 2203.05922); `docs/patches.md` has the experiments.
"""
