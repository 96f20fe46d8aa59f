"""Attention patterns: which maps of heads look alike, what they are called, and how far they follow the image.

maps     what is seen of a head: its patch block, its class row and column, on one grid for all layers
rules    the numbers that patterns are named from, read off attention maps
names    the rules that turn these numbers into names (no torch)
coders   from a map to a few numbers: an autoencoder, or PCA
layout   the standing map: t-SNE and clusters of a sample, and where another head goes (no torch)
model    a sample to learn from, the fitted model, and what is read off every map with it
density  the standing map as a landscape (no torch)
tables   the pattern of each head and each cluster of a study (no torch)

After Li et al. 2023; `docs/patterns.md` has the experiments, and what is ours.
"""
