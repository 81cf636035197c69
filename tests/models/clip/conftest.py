"""A published folder that tests of CLIP's converter read and leave as it is."""

import pytest
from published_clips import published_folder


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return published_folder(tmp_path_factory.mktemp("published"))
