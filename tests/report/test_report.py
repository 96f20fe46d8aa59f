"""The report of a study: complete, true to the study, one file, and safe whatever the study's names are."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from tiny_reports import ANALYSES, photographs, planted_study, small_vit

from vitrail.analysis import Analysis, analyses, measures, register, unregister
from vitrail.data.sources import PHOTOS
from vitrail.errors import StudyError, UsageError
from vitrail.heads.why import why_sentences
from vitrail.models.open import open_vit
from vitrail.patterns.tables import all_patterns
from vitrail.report import write_report
from vitrail.report.heads import heads
from vitrail.report.opening import studied
from vitrail.report.page import page
from vitrail.report.parts import ReportData, Section, Table, Text
from vitrail.report.sections import study_findings
from vitrail.sentence import Sentence
from vitrail.study.run import run_study
from vitrail.study.store import open_study
from vitrail.study.table import _most_important

HOSTILE = '</title><script>alert(1)</script><img src="http://x.test/y" onerror="alert(1)">&amp;"\''


class Read(HTMLParser):
    """Tags with their attributes, the text, and the sections' ids."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.pieces = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.pieces).split())

    @property
    def sections(self):
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def reported(study, tmp_path):
    return Read(write_report(study, tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(crops, tmp_path_factory):
    """The report of every analysis, written once."""
    return write_report(crops, tmp_path_factory.mktemp("whole") / "report.html")


@pytest.fixture(scope="module")
def read(whole):
    return Read(whole.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def read_masked(masked, tmp_path_factory):
    return reported(masked, tmp_path_factory.mktemp("masked"))


def loads(read):
    """Everything that a browser would fetch for this page."""
    return [attrs[name] for _, attrs in read.tags for name in ("src", "srcset", "data", "poster") if name in attrs]


def refuses_everything_foreign(read, html):
    assert loads(read)
    assert all(address.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for address in loads(read))
    assert all(attrs["href"].startswith("#") for _, attrs in read.tags if "href" in attrs)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in read.tags}
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html


def test_a_report_of_every_room_is_one_small_file_that_loads_nothing(whole, read):
    refuses_everything_foreign(read, whole.read_text(encoding="utf-8"))
    assert read.sections == [
        "findings",
        "studied",
        "heads",
        "why",
        "patterns",
        "patches",
        "head_windows",
        "tokens",
        "exciting",
        "cite",
    ]
    assert whole.stat().st_size < 3e6
    assert list(whole.parent.iterdir()) == [whole]
    policy = next(attrs for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_intervals_of_the_built_in_photographs_are_said_to_be_of_crops_of_thirteen():
    study = drops(10, 0.3)
    said = lambda study: [part.text for part in studied(study).parts if isinstance(part, Text)]  # noqa: E731
    assert not any("thirteen" in text for text in said(study))
    built_in = replace(study, manifest=replace(study.manifest, source=PHOTOS))
    assert any("hold for such crops of these thirteen" in text for text in said(built_in))


def test_measures_under_way_are_not_said_to_be_missing_too():
    study = drops(10, 0.3)
    said = lambda study: " ".join(part.text for part in studied(study).parts if isinstance(part, Text))  # noqa: E731
    assert "holds nothing of" in said(study)
    assert "patches" in said(study).partition("holds nothing of")[2]
    under_way = replace(study, data=study.data.assign_attrs(missing_measures=["tendency"]))
    assert "Begun and not complete, so left out here: tendency." in said(under_way)
    missing = said(under_way).partition("holds nothing of")[2].partition(".")[0]
    assert "tokens" in missing
    assert "patches" not in missing


def test_links_of_the_page_lead_to_its_sections(read):
    assert [attrs["href"] for tag, attrs in read.tags if tag == "a"] == [f"#{key}" for key in read.sections]


def test_every_picture_is_named_by_its_title_unless_a_line_stands_under_it(read):
    images = [attrs for tag, attrs in read.tags if tag == "img"]
    figures = [attrs for attrs in images if "svg" in attrs["src"][:20]]
    assert len(figures) >= 10
    assert all(attrs["alt"] for attrs in figures)


def test_the_first_finding_on_heads_is_what_the_study_says(crops, read):
    study = open_study(crops)
    lost = study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy()
    means = lost.astype(np.float64).mean(0)
    layer, head = np.unravel_index(means.argmax(), means.shape)
    sentence = re.search(r"Without (L\d+H\d+) the label loses ([\d.]+) of its", read.text)
    assert sentence[1] == f"L{layer}H{head}"
    assert_allclose(float(sentence[2]), means.max(), atol=6e-4)


def drops(n_images, first):
    """Seven heads that cost 0.1 on average, in a skewed way, and one that costs `first`."""
    lost = np.random.default_rng(0).exponential(0.1, (n_images, 2, 4)).clip(0, 0.6)
    lost[:, 1, 3] += first - 0.1
    arrays = {"probability": np.full(n_images, 0.9), "head_probability": 0.9 - lost.clip(-0.1, 0.9)}
    view = {"size": [64, 64], "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    return planted_study(arrays, [[4, 4]] * 2, n_classes=5, n_heads=[4, 4], preprocessing=view)


def test_the_interval_of_the_head_that_costs_most_is_of_all_heads_where_others_may_cost_as_much():
    alike, ahead = (heads(drops(60, first)).findings[0] for first in (0.1, 0.3))
    width = lambda text: -np.subtract(*map(float, re.search(r"([\d.]+) to ([\d.]+)\)", text).groups()))  # noqa: E731
    assert "(95 % interval of all heads at once 0." in alike
    assert "(95 % interval 0." in ahead
    assert width(alike) > 1.3 * width(ahead)
    tables = [_most_important(drops(60, first).data)[0] for first in (0.1, 0.3)]
    assert "95 %: of each head alone; on other images any of" in tables[0].caption
    assert tables[1].caption is None


def test_heads_that_can_go_are_said_to_do_so_each_by_itself():
    study = drops(400, 0.3)
    study.data["head_probability"][:, 0] = 0.9
    sentence = next(each for each in heads(study).findings if "can go, one at a time" in each)
    assert sentence.startswith("4 of 8 heads can go")
    assert "by itself at 95 %" in sentence
    assert "one in twenty is named by chance" in sentence


def test_a_head_is_explained_with_the_photographs_that_need_it_most(crops, whole):
    study = open_study(crops)
    lost = study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy()
    layer, head = np.unravel_index(lost.astype(np.float64).mean(0).argmax(), lost.shape[1:])
    most = int(lost[:, layer, head].argmax())
    explained = whole.read_text(encoding="utf-8").split('<section id="why">')[1].split(f"<h3>L{layer}H{head}</h3>")[1]
    picture = re.search(r'It matters most for .*?<img alt="" src="data:image/png;base64,([^"]+)">([^<]+)<', explained)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture[1]))).convert("RGB"), dtype=float)
    assert np.abs(pixels - study["thumbnail"].to_numpy()[most]).mean() < 6  # the palette of the picture has 128 colours
    before, after = study["probability"][most].item(), study["head_probability"][most, layer, head].item()
    assert picture[2] == f"{before:.2f} to {after:.2f}"


@pytest.mark.parametrize("which", ["crops", "masked"])
def test_the_numbers_beside_a_sentence_of_a_layer_are_those_that_it_gives(which, request):
    """The page draws them: a line that falls where the sentence says that something grows would be no evidence."""
    study = ReportData.of(request.getfixturevalue(which))
    makers = [make for analysis in analyses().values() for make in analysis.all_sections()]
    sections = [section for make in makers if (section := make(study)) is not None]
    told = [Sentence.of(each) for section in sections for each in section.findings]
    of_layers = [each for each in told if each.layer is not None and each.head is None]
    assert len(of_layers) > 4
    for each in of_layers:
        by_layer = np.moveaxis(study.data[each.measure].to_numpy(), 1, 0).reshape(study.plan.n_layers, -1)
        line = each.by_layer or np.nanmean(by_layer, axis=1)
        assert len(line) == study.plan.n_layers
        here = float(line[each.layer])
        said = {f"{100 * here:.0f} %", *(f"{here:.{digits}f}" for digits in (1, 2, 3))}
        assert any(number in each for number in said), (each, here)


def test_the_accuracy_is_that_of_the_predictions(crops, read):
    study = open_study(crops)
    right = 100 * (study["label"] == study["prediction"]).to_numpy().mean()
    assert f"The model is right about {right:.1f} % of the 12 images" in read.text


def test_robustness_is_told_from_the_stored_probabilities(crops, read):
    study = open_study(crops)
    left = {name: study[f"occlusion_{name}"].to_numpy()[:, 1].mean() for name in ("random", "salient")}
    assert (
        f"a probability of {left['random']:.2f} without random ones, {left['salient']:.2f} without salient" in read.text
    )


def test_every_measure_of_the_study_says_how_to_read_it_and_its_source(masked, read_masked):
    study = open_study(masked)
    for analysis in ANALYSES:
        for name in (name for name in study if study[name].attrs["room"] == analysis):
            for key in ("title", "low", "high", "source", "limits"):
                assert " ".join(str(study[name].attrs[key]).split()) in read_masked.text, (name, key)


def test_the_plan_is_told(crops, read):
    plan = json.loads((crops / "study.json").read_text())
    for told in (plan["model"], plan["weight_digest"][:16], plan["precision"], f"torch {plan['versions']['torch']}",
                 "batch size, seed 12, 0", "6 layers of 3 heads, 8 x 8 patches"):  # fmt: skip
        assert told in read.text
    assert "grouping_silhouette" in read.text
    assert "give a folder of instance ids" in read.text
    assert "--masks FOLDER" in read.text
    for number in ("2303.13731", "2203.05922", "2210.07646"):
        assert f"arXiv {number}" in read.text


@pytest.mark.usefixtures("blank_pictures")
def test_skipped_files_are_named_with_their_reason(tmp_path):
    folder = photographs(tmp_path, 2)
    (folder / "photos" / "broken.png").write_bytes(b"no picture")
    run_study(small_vit(), folder / "photos", out=tmp_path / "study", measures="token_norm", batch_size=2)
    text = reported(tmp_path / "study", tmp_path).text
    assert "Files that were skipped (1)" in text
    assert "broken.png" in text


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_study_of_one_analysis_has_its_section_and_says_how_to_have_the_others(analysis, tmp_path):
    folder = photographs(tmp_path, 3)
    run_study(small_vit(), folder / "photos", out=tmp_path / "study", measures=analysis, batch_size=3)
    read = reported(tmp_path / "study", tmp_path)
    own = {"heads": ["heads", "why"], "regions": ["why"]}.get(analysis, [analysis])
    assert read.sections == ["findings", "studied", *own, "cite"]
    others = [each for each in ANALYSES if each != analysis]
    of_any_vit = [name for name, each in analyses().items() if name not in ("base", "objects") and not each.only_for]
    missing = [each for each in of_any_vit if each in others]
    assert f"holds nothing of {' and '.join(missing)}" in read.text
    assert f"--measures {','.join(missing)} " in read.text


def test_a_study_of_one_image_has_no_intervals(tmp_path):
    run_study(open_vit("vitrail:photos"), "photos", out=tmp_path / "study", limit=1, measures=",".join(ANALYSES))
    read = reported(tmp_path / "study", tmp_path)
    assert read.sections == [
        "findings",
        "studied",
        "heads",
        "why",
        "patterns",
        "patches",
        "head_windows",
        "tokens",
        "cite",
    ]
    assert re.search(
        r"loses [\d.]+ of its probability(, and the answer changes)?: no head costs this image more", read.text
    )
    assert "interval" not in read.text.split("How to cite")[0].split("How to read these numbers")[0]
    assert "1 images" not in read.text
    numbers = read.text
    limits = {" ".join(measure.limits.split()) for measure in measures().values()}
    for words in sorted(limits, key=len, reverse=True):  # they may say where a measure is NaN
        numbers = numbers.replace(words, "")
    assert "nan" not in numbers.lower().split()


def test_a_study_of_constant_images_is_reported_in_numbers(tmp_path):
    """Black, white and grey: no texture, no edge, nothing that tells one patch from another but its place."""
    (tmp_path / "photos").mkdir()
    for level in (0, 127, 255):
        Image.new("RGB", (40, 40), (level, level, level)).save(tmp_path / "photos" / f"{level}.png")
    measures = "heads,patches,tokens"
    study = run_study(small_vit(), tmp_path / "photos", out=tmp_path / "study", measures=measures, batch_size=3)
    for name in ("head_probability", "strength_entropy", "interaction_distance", "token_norm"):
        assert np.isfinite(study[name]).all(), name
    texts = [each["text"] for each in study_findings(tmp_path / "study")]
    assert any(text.startswith("Without L") for text in texts)
    assert not [text for text in texts if "nan" in text.lower().split()]


def test_without_labels_accuracy_is_not_claimed(read_masked):
    assert "Accuracy is not known; the label of an image is the model's own top-1 prediction" in read_masked.text
    assert read_masked.text.index("Accuracy is not known") > read_masked.text.index("no head costs more")
    assert "top-1 without it" not in read_masked.text
    assert "Grouping, 4 images" in read_masked.text


def test_a_model_without_a_classifier_is_reported_by_what_it_has(tmp_path):
    folder = photographs(tmp_path, 3)
    run_study(
        small_vit(num_classes=0), folder / "photos", out=tmp_path / "study", measures=",".join(ANALYSES), batch_size=3
    )
    read = reported(tmp_path / "study", tmp_path)
    assert read.sections == [
        "findings",
        "studied",
        "heads",
        "why",
        "patterns",
        "patches",
        "head_windows",
        "tokens",
        "exciting",
        "cite",
    ]
    assert "Accuracy is not known: the model has no classifier." in read.text
    assert "matters most by shift of the output without this head" in read.text


@pytest.mark.usefixtures("blank_pictures")
def test_single_measures_make_a_report_too(tmp_path):
    folder = photographs(tmp_path, 2)
    for name in ("strength_entropy", "hub", "occlusion_random", "shuffle_drift", "head_cls_shift", "window"):
        run_study(small_vit(), folder / "photos", out=tmp_path / name, measures=name, batch_size=2)
        assert name in reported(tmp_path / name, tmp_path).text


def test_a_hierarchy_with_windows_is_reported(tmp_path):
    import timm

    folder = photographs(tmp_path, 2)
    shape = {"img_size": 32, "window_size": 2, "depths": (2, 2), "embed_dim": 12, "num_heads": (2, 3), "num_classes": 4}
    vit = open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape).eval(), image_size=32)
    run_study(vit, folder / "photos", out=tmp_path / "study", measures=",".join(ANALYSES), batch_size=2)
    read = reported(tmp_path / "study", tmp_path)
    assert read.sections == ["findings", "studied", "heads", "why", "patches", "tokens", "exciting", "cite"]
    assert "pattern_rule" in read.text.split("Measures left out")[1]  # no map of all patches
    assert "4 layers of 2 to 3 heads" in read.text


def test_hostile_names_are_shown_and_do_nothing(crops, tmp_path):
    study = tmp_path / "study"
    shutil.copytree(crops, study)
    plan = json.loads((study / "study.json").read_text())
    del plan["digest"]  # as in older studies: one that does not fit the changed plan would be refused
    plan["model"] = plan["labels_from"] = HOSTILE
    plan["class_names"] = [f"{HOSTILE}{number}" for number in range(len(plan["class_names"]))]
    plan["left_out"] = {HOSTILE: HOSTILE}
    (study / "study.json").write_text(json.dumps(plan))
    manifest = json.loads((study / "images.json").read_text())
    manifest["skipped"] = [{"id": HOSTILE, "reason": HOSTILE}]
    (study / "images.json").write_text(json.dumps(manifest))
    html = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    read = Read(html)
    refuses_everything_foreign(read, html)
    assert read.text.count("<script>alert(1)</script>") > 8
    title = re.search(r"<title>(.*?)</title>", html, re.DOTALL)[1]
    assert title.startswith("&lt;/title&gt;&lt;script&gt;")


def test_text_that_a_section_gives_is_escaped_in_every_part():
    parts = (Text(HOSTILE), Text(HOSTILE, code=True), Table(HOSTILE, (HOSTILE, "b"), [[HOSTILE, HOSTILE]], HOSTILE))
    html = page(HOSTILE, HOSTILE, [Section(HOSTILE, HOSTILE, (HOSTILE,), parts)])
    assert {"script", "img"} & {tag for tag, _ in Read(html).tags} == set()


def test_the_same_study_gives_the_same_bytes(crops, whole, tmp_path):
    assert write_report(crops, tmp_path / "again.html").read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("blank_pictures")
def test_a_registered_analysis_adds_its_sections(crops, tmp_path):
    def own(study: ReportData) -> Section:
        return Section("own", "Of my own", [f"{study.n_images} crops were weighed."], [Text("A paragraph.")])

    register(Analysis(name="mine", title="", question="", measures=(), sections=(own, lambda study: None)))
    try:
        read = reported(crops, tmp_path)
    finally:
        unregister("mine")
    assert read.sections[-2:] == ["own", "cite"]
    assert read.text.count("12 crops were weighed.") == 2  # in its place, and among the main findings


@pytest.mark.usefixtures("blank_pictures")
def test_by_default_the_report_lies_in_the_study_which_can_go_on(tmp_path):
    folder = photographs(tmp_path, 2)
    run_study(small_vit(), folder / "photos", out=tmp_path / "study", measures="token_norm", batch_size=2)
    assert write_report(tmp_path / "study") == tmp_path / "study" / "report.html"
    run_study(small_vit(), folder / "photos", out=tmp_path / "study", measures="token_norm", batch_size=2)


def test_what_is_no_study_and_what_cannot_be_written_are_refused(crops, tmp_path):
    with pytest.raises(StudyError, match="is not a study"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="is a folder; name the file"):
        write_report(crops, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(crops, tmp_path / "file" / "report.html")


def test_large_studies_are_sampled_where_each_patch_has_a_value(crops, monkeypatch):
    from vitrail.report import parts

    monkeypatch.setattr(parts, "SAMPLED", 5)
    study = ReportData.of(crops)
    assert study.sample.sizes["image"] == 5
    assert study.sample["image"].to_numpy().tolist() == [study.data["image"].to_numpy()[at] for at in (0, 3, 6, 8, 11)]
    assert study.sample_words == "Of 5 images, evenly spaced over the study."


def test_the_most_important_head_is_explained_by_the_study_s_own_numbers(crops, read):
    study = open_study(crops)
    lost = study["probability"].to_numpy()[:, None, None] - study["head_probability"].to_numpy()
    layer, head = (int(at) for at in np.unravel_index(lost.mean(0, dtype=np.float64).argmax(), lost.shape[1:]))
    assert f"L{layer}H{head} is 1st of 18 heads" in read.text
    assert all(sentence in read.text for sentence in why_sentences(study, layer, head))


def test_every_head_s_pattern_stands_beside_the_rule_that_names_it(crops, read):
    for pattern in all_patterns(open_study(crops)):
        assert pattern.naming.label in read.text
        assert pattern.naming.rule in read.text
