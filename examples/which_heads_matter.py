"""Which heads of a model matter, and for how many images: prunes every head in turn over 64 photographs.

Prints the five heads whose removal costs most of the label's probability. About 10 seconds on two cores.
Use your own: vitrail.open_vit("timm:deit_tiny_patch16_224") and the path of a folder of photographs.
"""

import tempfile

import vitrail

vit = vitrail.open_vit("vitrail:photos")  # the small model that comes with Vitrail
with tempfile.TemporaryDirectory() as folder:
    study = vitrail.run_study(vit, "photos", out=folder, limit=64)
    lost = (study.probability - study.head_probability).mean("image")
    ranked = lost.stack(at=("layer", "head")).sortby(lost.stack(at=("layer", "head")), ascending=False)
    for value in ranked[:5]:
        layer, head = value["at"].item()
        print(f"L{layer}H{head}: pruning it costs {value.item():+.3f} of the label's probability")
