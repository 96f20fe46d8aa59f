"""Sentences of a study as the page gets them: those of the report, with the measure, head and images they speak of."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from synthetic_study import N_HEADS, N_LAYERS, write_study
from vitrail.analysis import Analysis, register, unregister
from vitrail.app import create_app
from vitrail.heads.why import why_sentences
from vitrail.report import findings_of
from vitrail.report.opening import accuracy
from vitrail.report.parts import ReportData, Section
from vitrail.sentence import Sentence, percent
from vitrail.study.store import open_study

HOME = "http://127.0.0.1:8765"
N_IMAGES = 70


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("planted"), N_IMAGES)


@pytest.fixture(scope="module")
def client(study: Path) -> Iterator[TestClient]:
    with TestClient(create_app(study), base_url=HOME) as client:
        yield client


def test_a_sentence_is_the_string_that_it_is_made_of_and_names_its_evidence() -> None:
    sentence = Sentence("L1H2 costs 0.3.", measure="head_probability", layer=1, head=2, images=[(4, "0.9 to 0.1")])
    assert sentence == "L1H2 costs 0.3."
    assert Sentence.of(sentence) is sentence
    assert sentence.to_json()["images"] == [{"image": 4, "words": "0.9 to 0.1"}]
    assert Sentence.of("plain").to_json()["measure"] == ""


def test_the_first_sentence_of_heads_names_the_planted_head_and_the_images_that_need_it(
    client: TestClient, study: Path
) -> None:
    sentences = client.get("/api/findings/heads").json()["sentences"]
    dataset = open_study(study)
    lost = dataset.probability.values[:, None, None] - dataset.head_probability.values
    layer, head = np.unravel_index(lost.mean(0).argmax(), lost.shape[1:])
    first = sentences[0]
    assert first["text"].startswith(f"Without L{layer}H{head}")
    assert (first["measure"], first["layer"], first["head"]) == ("head_probability", layer, head)
    images = [each["image"] for each in first["images"]]
    assert images == np.argsort(-lost[:, layer, head], kind="stable")[:4].tolist()
    before, after = dataset.probability.values[images[0]], dataset.head_probability.values[images[0], layer, head]
    assert first["images"][0]["words"] == f"{before:.2f} to {after:.2f}"
    named = {name for each in sentences for name in (each["measure"], *(part["measure"] for part in each["evidence"]))}
    assert named - {""} <= set(dataset.data_vars)
    for each in sentences:
        assert all(part["text"] in each["text"] for part in each["evidence"])


def test_heads_that_cost_next_to_nothing_have_no_photographs_and_no_minus_zero(study: Path) -> None:
    dataset = open_study(study)
    gains = np.full(dataset.head_probability.shape, 1e-6) * np.linspace(1, 2, N_IMAGES)[:, None, None]
    without = dataset.probability.astype("float64") + dataset.head_probability.copy(data=gains)
    told = findings_of(dataset.assign(head_probability=without))
    none = next(each for each in told if each == "None of the images loses more than 0.1 by any single head.")
    assert isinstance(none, Sentence)
    assert none.images == ()
    assert not any("-0.000" in each for each in told)


def test_a_share_is_not_rounded_to_none_or_all() -> None:
    assert [percent(share) for share in (0, 0.004, 0.006, 0.5, 0.994, 0.996, 1)] == [
        "0 %", "below 1 %", "1 %", "50 %", "99 %", "above 99 %", "100 %",
    ]  # fmt: skip
    assert [percent(share, 1) for share in (0.0004, 0.996, 0.9996)] == ["below 0.1 %", "99.6 %", "above 99.9 %"]
    assert percent(np.float32(1 - 1e-7)) == "100 %"


def test_accuracy_names_the_mistakes_that_the_model_was_surest_of(client: TestClient, study: Path) -> None:
    (sentence,) = client.get("/api/findings/base").json()["sentences"]
    dataset = open_study(study)
    wrong = np.flatnonzero((dataset.prediction != dataset.label).values)
    surest = dataset["top_probability"].load().copy()
    surest[wrong[-1], 0] = 0.99
    read = ReportData.of(study)
    told = accuracy(ReportData(study, dataset.assign(top_probability=surest), read.plan, read.manifest))
    assert (told.images[0][0], told.caption) == (wrong[-1], "the mistakes that the model is surest of")
    told = accuracy(ReportData(study, dataset.drop_vars("top_probability"), read.plan, read.manifest))
    assert told.images[0][0] == wrong[dataset.probability.values[wrong].argmin()]
    assert told.caption == "the mistakes whose label the model held for least likely"
    assert f"{100 * (1 - len(wrong) / N_IMAGES):.1f} %" in sentence["text"]
    listed = client.get("/api/findings").json()["analyses"]
    assert [each["name"] for each in listed] == ["base", "heads"]


def test_a_study_without_labels_or_classifier_says_why_accuracy_is_not_known(tmp_path: Path) -> None:
    sentence = accuracy(ReportData.of(write_study(tmp_path, 24, classifier=False)))
    assert "no classifier" in sentence
    assert sentence.images == ()


def test_why_a_head_matters_has_the_measure_of_every_sentence(client: TestClient, study: Path) -> None:
    dataset = open_study(study)
    said = client.get(f"/api/why?layer={N_LAYERS - 1}&head=0").json()["sentences"]
    assert [each["text"] for each in said] == why_sentences(dataset, N_LAYERS - 1, 0)
    known = [each for each in said if not each["text"].startswith("This study does not hold")]
    assert all(each["measure"] in dataset for each in known)
    by_metric = next(each for each in said if each["text"].startswith("By other measures"))
    assert {part["measure"] for part in by_metric["evidence"]} >= {"head_divergence", "head_loss_change"}
    assert all(part["text"] in by_metric["text"] for part in by_metric["evidence"])
    for query in (f"layer=0&head={N_HEADS}", "layer=x&head=0", "layer=0"):
        assert client.get(f"/api/why?{query}").status_code == 404
    assert client.get("/api/findings/none").status_code == 404


def test_an_analysis_from_outside_is_heard_with_plain_strings(study: Path) -> None:
    mine = Analysis(
        name="mine",
        title="Mine",
        question="What?",
        measures=(),
        sections=(lambda _study: Section("mine", "Mine", ("12 crops were weighed.",)),),
    )
    register(mine)
    try:
        with TestClient(create_app(study), base_url=HOME) as client:
            (sentence,) = client.get("/api/findings/mine").json()["sentences"]
    finally:
        unregister("mine")
    assert (sentence["text"], sentence["measure"]) == ("12 crops were weighed.", "")
