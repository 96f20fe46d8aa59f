"""What tests of the neurons room share."""

import pytest
from token_models import small_images, small_vit


@pytest.fixture(scope="session")
def vit():
    return small_vit()


@pytest.fixture(scope="session")
def images():
    return small_images()
