"""One finished run that several files look at, and copies of it for those that change it."""

import shutil

import pytest
from support import runs


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Decoded images are kept out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REBALFER_DATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder of a finished run called "one": two epochs, with pictures. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs")
    assert runs.train(folder, "--name=one", "--epochs=2", "--output.pictures=true") == 0
    return folder


@pytest.fixture(scope="session")
def finished(root):
    """That run."""
    return root / "one"


@pytest.fixture
def copy(root, tmp_path):
    """A root with a copy of that run, to be changed."""
    return shutil.copytree(root, tmp_path / "copy")
