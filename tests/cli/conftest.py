import logging

import pytest
from support.command_line import SMALL
from support.docstrings import remember_attribute_docstrings

remember_attribute_docstrings()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty directory to work in, with a small config and some texts."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning logs to the stderr of the first test, closed now
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for index in range(12):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"document {index} counts: " + " ".join(map(str, range(90))))
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path
