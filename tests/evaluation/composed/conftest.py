import pytest
from composed_toys import small_pic2word


@pytest.fixture(scope="package")
def pic2word():
    """A small Pic2Word and its processor."""
    return small_pic2word()
