"""Heads: which heads matter, and how far they look.

metrics      how far apart two predictions or two sets of tokens are
importance   leave-one-head-out, exactly
estimate     the same from one backward pass
correction   means of estimates, corrected by a sample with exact values (no torch)
exact_names  the measures that such a sample has (no torch)
means        the mean output of a head, which may stand in its place
regions      which part of one head's map matters: the six region modes
strength     attention over distance
why          why a head matters: its table and its sentences (no torch)
summary      a study's heads in one table (no torch)
head_values  one number per head out of a study, with its interval (no torch)
classes      which heads matter for which class (no torch)
query_maps   where one query looks, on the grid of patches (no torch)
one_image    where every head of one image looks
collect      the above as collectors that share one pass
"""
