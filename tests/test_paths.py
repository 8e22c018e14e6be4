"""Paths as users write them are expanded once, by one function, wherever settings enter."""

from pathlib import Path

import pytest
from nsa_kernels.errors import SettingError

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.sources import find_files
from nsa_lightning.paths import expand_path
from nsa_lightning.training.callbacks import RunCheckpoint


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    monkeypatch.delenv("NOTHING", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_is_expanded_once(home, monkeypatch):
    monkeypatch.setenv("ODD", "~/$PLACE")
    written = ["~/a", "$PLACE/a", "${PLACE}/a", "s3://$ODD", "a~/b", "/x/$ODD/y", "a$5.txt", "~"]
    expected = [f"{home}/a", f"{home}/place/a", f"{home}/place/a", "s3://~/$PLACE", "a~/b", "/x/~/$PLACE/y", "a$5.txt"]
    assert [expand_path(path) for path in written] == [*expected, str(home)]


@pytest.mark.parametrize("path", ["$NOTHING/a", "x/${NOTHING}", "~nobody_of_that_name/a"])
def test_a_variable_or_user_that_does_not_exist_is_refused_by_name(path):
    with pytest.raises(SettingError, match=r"NOTHING|nobody_of_that_name"):
        expand_path(path)


def test_what_exists_under_its_literal_name_keeps_it(home):
    (home / "for$NOTHING").touch()
    assert expand_path("for$NOTHING") == "for$NOTHING"


def test_our_classes_expand_the_paths_they_are_given(home):
    (home / "a.txt").write_text("text")
    assert RunCheckpoint(dirpath="~/ck").dirpath == str(home / "ck")
    assert RunCheckpoint("$PLACE").given_dirpath == str(home / "place")
    assert RunCheckpoint().given_dirpath is None
    assert PackedTextDataModule(sources="~/a.txt", cache_dir="$PLACE/cache").cache_dir == home / "place" / "cache"
    assert [Path(file.name) for file in find_files(["$HOME/a.txt"])] == [home / "a.txt"]
