"""Broken images are decoded, or refused in a sentence: no other error. The long form is `make faults`."""

from broken_images import FORMATS, PER_SEED, broken_images
from image_trial import try_images

N_SEEDS = 4


def test_every_broken_image_is_decoded_or_refused_in_a_sentence() -> None:
    trial = try_images(range(N_SEEDS))
    assert trial.faults == []
    assert trial.n_images == N_SEEDS * PER_SEED
    assert trial.n_refused > trial.n_decoded > N_SEEDS * len(FORMATS)  # damages of both kinds are tried
    assert trial.slowest_s < 5


def test_the_same_seed_gives_the_same_files() -> None:
    assert list(broken_images(3)) == list(broken_images(3))
    assert list(broken_images(3)) != list(broken_images(4))


def test_a_file_that_unfolds_into_a_huge_picture_is_refused() -> None:
    trial = try_images(range(2), only="bomb")
    assert trial.faults == []
    assert trial.n_refused == trial.n_images == 2
