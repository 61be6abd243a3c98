import os

import pytest


@pytest.fixture
def device():
    return os.environ.get("FUSEDRES_TEST_DEVICE", "cpu")
