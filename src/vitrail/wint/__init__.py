"""WinT, the window-free transformer: a ViT in which each patch predicts the window that it attends within.

model       the transformer, its window heads and masks; the same heads on a timm model (`attach`)
folder      saved as config.json and model.safetensors; opened by `open_vit`
teacher     the windows of a trained ViT on the view that the student sees
recipe      what a training run is, as a TOML file with its expected result and cost
batches     images, augmentation and order as a function of seed and step
building    what a recipe asks for: model, teacher, optimiser, schedule
train       the loop: resumable to the bit, on one device or several
objectives  what training minimises
checkpoint  what a resumed run starts from
sparse      windows as block-sparse attention (FlexAttention)

Known of Ma et al. 2022 (arXiv 2203.05922): attention windows are predicted, differ from layer to layer, and are guided
by the interactions of a trained ViT. All formulas here are our construction; `docs/wint.md` has the experiments.
"""
