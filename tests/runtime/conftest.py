from collections.abc import Iterator
from typing import Any

import pytest

from tiny_model import ONE_LAYER, build, random_weights, tiny_model


@pytest.fixture(scope="module", autouse=True)
def _model_of_this_file() -> None:
    """Graphs depend on settings of the process: what tests of another file left there would have them captured anew."""
    tiny_model.cache_clear()


@pytest.fixture
def model() -> Iterator[Any]:
    """The shared model, which gets its pages back."""
    model = tiny_model()
    free = model.engine.cache.free_pages
    yield model
    assert model.engine.cache.free_pages == free, "pages were kept"


@pytest.fixture(scope="module")
def one_layer() -> Any:
    """A model built from a module."""
    return build(random_weights(ONE_LAYER))
