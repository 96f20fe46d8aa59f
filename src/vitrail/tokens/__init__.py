"""Tokens and neurons: what filters, neurons and tokens see, how tokens group, and what they survive.

levels      the tokens of a model level by level
embedding   level 0: the patch embedding as filters over pixels
flow        attention as a flow between tokens, and rollout
views       what one neuron sees, plain and faithful, and how far the two agree
display     how views become pictures (no torch)
filters     which filters let objects stand out
excite      the images that excite a neuron, and one made to
robustness  occlusion and shuffling
amounts     how many patches are lost, how many cells are shuffled (no torch)
grouping    do tokens of one object find together
vectors     principal components as colour, norms, similarity
outliers    tokens of outlying norm (no torch)
artefacts   which neurons and heads write them; models without these neurons, and with registers
artefact_trial     what such models do to outlying tokens, answers, attention and grouping, with a null
artefact_findings  the same in sentences (no torch)
matches     the patches of other images that are most like one
relevance   which patches a prediction rests on, and curves that judge the methods
summary     a study's tokens summed up over its images (no torch)
one_image   the arrays of one image
collect     token norms, grouping and robustness as collectors of a study

After Nguyen et al. 2022 (arXiv 2210.07646); `docs/tokens.md` has the experiments, and what is ours.
"""
