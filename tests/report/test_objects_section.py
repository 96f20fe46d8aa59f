"""What the report says of heads and objects: the planted head is named with its null, and chance is called chance."""

import re
from dataclasses import replace

import numpy as np
import pytest

from report.tiny_reports import planted_study
from vitrail.errors import UsageError
from vitrail.figures.objects import best_maps, example_map_grid, score_maps
from vitrail.report.objects import objects
from vitrail.report.parts import ReportData, Table
from vitrail.sentence import Sentence

N_IMAGES, GRID = 40, [4, 4]


def planted(best: float, n_images: int = N_IMAGES) -> ReportData:
    """Three layers of two heads at 0.6; L2H1 at `best`; the first image has no mask."""
    random = np.random.default_rng(0)
    arrays = {}
    for score in ("pointing", "iou", "auroc"):
        for kind in ("", "patch_"):
            own = random.normal(0.6, 0.08, (n_images, 3, 2))
            own[:, 2, 1] += best - 0.6
            arrays[f"object_{kind}{score}"] = own
            arrays[f"object_{kind}{score}_null"] = random.normal(0.6, 0.08, own.shape)
        arrays[f"object_layer_{score}"] = arrays[f"object_{score}"].mean(2)
        arrays[f"object_layer_{score}_null"] = arrays[f"object_{score}_null"].mean(2)
        arrays[f"object_centre_{score}"] = random.normal(0.7, 0.08, n_images)
    arrays = {name: values.clip(0, 1).astype(np.float32) for name, values in arrays.items()}
    maps = np.full((n_images, 3, 2, 16), np.nan, np.float32)
    maps[1::2] = random.random((len(maps[1::2]), 3, 2, 16))
    arrays |= {"object_map": maps, "object_share": (random.random((n_images, 16)) < 0.4).astype(np.float32)}
    for values in arrays.values():
        values[0] = np.nan
    arrays["thumbnail"] = random.integers(0, 255, (n_images, 8, 8, 3), dtype=np.uint8)
    return planted_study(arrays, [GRID] * 3)


def test_the_planted_head_leads_the_findings_with_its_null_and_the_blob() -> None:
    section = objects(planted(0.9))
    first, beyond, chance, blob, patches, layer, *rest = section.findings
    assert first.startswith("L2H1 finds the objects of 39 images best, by the map of its class token: AUROC 0.")
    assert "95 % interval" in first
    assert beyond == "L2H1 is the best head beyond these images, too (95 %)."
    assert "; 1 of the 6 heads is shown to find the objects of the image itself better" in chance
    assert "has 0.7" in blob
    assert "1 head is shown to beat it" in blob
    assert patches.startswith("Asked by a patch of an object, L2H1 finds the rest of that object best")
    assert "that of L2 is best" in layer
    assert rest == []
    tables = [part for part in section.all_parts() if isinstance(part, Table)]
    assert tables[0].rows[0][0] == "L2H1"
    assert [row[0] for row in tables[3].rows] == ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"]


def test_chance_is_called_chance() -> None:
    _, beyond, chance, blob, *_ = objects(planted(0.6)).findings
    assert "heads may be the best one" in beyond
    assert "; none of the 6 heads is shown to find" in chance
    assert "no head is shown to beat it" in blob


def test_sentences_of_objects_name_the_head_that_they_lead_to() -> None:
    best, *others = objects(planted(0.9)).findings
    assert (best.measure, best.layer, best.head) == ("object_auroc", 2, 1)
    assert {each.measure for each in others if isinstance(each, Sentence)} <= {
        "object_patch_auroc",
        "object_layer_auroc",
    }


def test_a_head_whose_maps_score_the_same_of_all_images_silences_no_other() -> None:
    study = planted(0.9)
    study.data["object_auroc"][:, 0, 0] = 0.5
    section = objects(study)
    assert any("is the best head beyond these images, too" in sentence for sentence in section.findings)
    assert re.match(
        r"Some heads have no interval: the same value in all images \(\d+\), for 1 of 6", section.all_parts()[0].text
    )


def test_few_images_have_no_intervals_and_the_reason_stands_there() -> None:
    section = objects(planted(0.9, 5))
    assert "interval" not in section.findings[0]
    assert "too few images" in next(iter(section.all_parts())).text
    null = next(sentence for sentence in section.findings if "other images' objects" in sentence)
    assert "heads" not in null


def test_maps_are_of_the_mean_query_where_the_class_token_joins_later() -> None:
    late = planted(0.9)
    late.data.attrs["prefixes"] = [1, 1, 0]
    assert "by the map of its mean query" in objects(late).findings[0]
    assert "patches look on average" in example_map_grid(late.data).get_supxlabel().replace("\n", " ")
    assert "the class token's map, or the mean query's" in score_maps(late.data).axes[0].get_title("left")
    late.data.attrs["prefixes"] = [0, 0, 0]
    assert "the map of the mean query" in score_maps(late.data).axes[0].get_title("left")


def test_heads_that_share_the_best_score_are_no_other_best_head() -> None:
    study = planted(0.9)
    study.data["object_pointing"][1:] = 1
    study.data["object_iou"][1:, 0, 0] = 1
    other = next(sentence for sentence in objects(study).findings if sentence.startswith("Another score"))
    assert other == "Another score has another best head: by overlap L0H0."


def test_the_strongest_patch_of_one_image_lies_on_an_object_or_on_none() -> None:
    for value, words in ((1, "on an object;"), (0, "on no object;")):
        study = planted(0.9, 2)
        study.data["object_pointing"][:] = value
        alone = ReportData(study.folder, study.data.isel(image=[1]), replace(study.plan, n_images=1), study.manifest)
        assert f"its strongest patch lies {words}" in objects(alone).findings[0]


def test_figures_name_the_best_head_and_show_its_maps_from_best_to_worst() -> None:
    study = planted(0.9).data
    assert "best: L2H1" in score_maps(study).axes[2].get_xlabel()
    figure = example_map_grid(study)
    assert figure.get_suptitle().startswith("L2H1")
    scores = [float(axes.get_title("left").split()[-1]) for axes in figure.axes if axes.get_title("left")]
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    assert example_map_grid(study.drop_vars("object_map")) is None


def test_one_image_is_drawn_with_its_best_heads() -> None:
    study = planted(0.9).data.isel(image=[1]).drop_vars("thumbnail")
    random = np.random.default_rng(1)
    looked = study.assign(
        view=(("row", "column", "channel"), random.integers(0, 255, (32, 32, 3), dtype=np.uint8)),
        head_map=(("layer", "head", "patch"), random.random((3, 2, 16))),
    )
    titles = [axes.get_title("left") for axes in best_maps(looked).axes if axes.get_title("left")]
    assert titles[0] == "the objects"
    assert titles[1].startswith("L2H1: ")
    assert len(titles) == 6
    assert best_maps(looked.drop_vars("object_auroc")) is None


def test_a_study_without_scores_has_no_section() -> None:
    assert objects(planted_study({"object_share": np.zeros((3, 16), np.float32)}, [GRID] * 3)) is None
    with pytest.raises(UsageError, match="no scores"):
        score_maps(planted_study({"object_share": np.zeros((3, 16), np.float32)}, [GRID] * 3).data)
