"""Pruning heads: in which order, masked or removed for good, and how much accuracy is lost.

ranking  rankings of heads and their cumulative pruning curves (no torch)
masked   outputs of a model without several heads
removal  heads removed for good: smaller linear maps
saving   a pruned model as a folder that needs its own library alone
prune    `vitrail prune`: choose, remove, evaluate, save
"""
