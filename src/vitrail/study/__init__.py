"""A study: what is measured over many images, as a folder that can be stopped and resumed anywhere.

plan       what a study is, settled before the first image: its digest is the study's identity
planning   from a model, images and options to a plan
run        `run_study`
batches    parts of images through the collectors
writing    the folder: arrays, parts, what makes a part complete
store      `open_study`: the folder as an xarray dataset, without torch
derived, patterns  what needs all images
ownership, locking  whose a folder is, and who writes it
progress   what is said while it runs
reopen     the model of a finished study
"""
