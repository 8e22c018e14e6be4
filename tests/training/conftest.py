"""What the tests of training share."""

import pytest
from support.training import write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for a module's runs, with a corpus in it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "corpus").mkdir()
    write_corpus(root / "corpus")
    return root
