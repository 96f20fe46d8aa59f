"""A measure of your own, wherever Vitrail's are: study, report, figures, look, page, command line (give it a command).

In a package of yours, name `OWN` in an entry point of the group `vitrail.analyses` instead of the last lines.
"""

import importlib
import sys
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import vitrail
from vitrail.report.parts import Section


class SelfAttention:
    measures, replays = ("self_attention",), False

    def __init__(self, n_layers):
        self.layers = [None] * n_layers

    def readers(self):
        return vitrail.Readers(attention=self.read)

    def read(self, attention):  # called at each layer of the plain pass
        patches = attention.weights()[:, :, attention.prefix :, attention.prefix :]  # [image head query key]
        self.layers[attention.layer] = patches.diagonal(dim1=-2, dim2=-1).mean(-1).float().cpu().numpy()

    def finish(self, tap, replay, logits, labels):
        return {"self_attention": np.stack(self.layers, axis=1)}


def figure(study):
    drawing, axes = plt.subplots()
    axes.plot(study["self_attention"].mean(("image", "head")))
    axes.set(title="How much of their attention patches keep", xlabel="layer", ylabel="share, mean over heads")
    return drawing


def section(study):
    highest = float(study.data["self_attention"].mean("image").max())
    return Section("own", "Self-attention", [f"One head's patches keep {highest:.1%} of their attention."])


MEASURE = vitrail.Measure(
    name="self_attention", title="attention of a patch to itself", dims=("image", "layer", "head"), unit="1",
    low="looks elsewhere", high="looks at itself", source="an example", limits="which patches", needs=("grid",),
)  # fmt: skip
OWN = vitrail.Analysis(
    name="own", title="Self-attention", question="Which heads let patches look at themselves?", measures=(MEASURE,),
    collectors=lambda vit, names, options: [SelfAttention(vit.n_layers)],
    figures=[vitrail.Figure("self_attention", figure, both=True)], sections=(section,),
)  # fmt: skip
vitrail.register(OWN)
if len(sys.argv) > 1:
    importlib.import_module("vitrail.cli").main()  # does not return
vit, folder = vitrail.open_vit("vitrail:photos"), tempfile.mkdtemp()
print(vitrail.run_study(vit, "photos", out=folder, measures="own", limit=32)["self_attention"].mean("image").round(3))
