"""Checkpoints on disk: always one complete, found by a new run, and never a program."""

import contextlib
import os
import pickle
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from nsa_lightning.checkpoint import atomic
from nsa_lightning.checkpoint.atomic import beside, publish, remove, save_file
from nsa_lightning.checkpoint.consolidate import consolidate
from nsa_lightning.checkpoint.find import find_best, find_last
from nsa_lightning.checkpoint.sharded import META, join, read_whole, split
from nsa_lightning.checkpoint.summary import read_summary
from nsa_lightning.training.checkpoint_io import RunCheckpointIO

ORDERS = [["b", "a"], ["a"]]


def checkpoint(step):
    """The layout that Lightning gives a checkpoint of one file, with two optimizers."""
    weights = {"a": torch.full((3, 2), float(step)), "b": torch.full((2,), step + 0.5)}
    states = [
        {
            "state": {
                i: {"exp_avg": weights[name] * 2, "step": torch.tensor(float(step)), "kind": "sum"}
                for i, name in enumerate(order)
            },
            "param_groups": [{"lr": 0.1 * step, "betas": (0.9, 0.95), "params": list(range(len(order)))}],
        }
        for order in ORDERS
    ]
    return {
        "state_dict": weights,
        "optimizer_states": states,
        "global_step": step,
        "pytorch-lightning_version": "2.6",
        "callbacks": {"RunCheckpoint": {"best_model_path": ""}},
    }


def save_sharded(step, path):
    """What the strategy does on one rank."""
    temporary = beside(path, "tmp")
    remove(temporary)
    tensors, rest = split(checkpoint(step), ORDERS)
    dcp.save(tensors, checkpoint_id=temporary, no_dist=True)
    save_file(rest, temporary / META)
    publish(temporary, path)


def save_one_file(step, path):
    RunCheckpointIO().save_checkpoint(checkpoint(step), path)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(actual[key], value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for pair in zip(actual[key], value, strict=True):
                assert_equal(*pair)
        else:
            assert torch.equal(actual[key], value) if isinstance(value, torch.Tensor) else actual[key] == value


def test_a_sharded_checkpoint_reads_as_one_file(tmp_path):
    save_sharded(3, tmp_path / "last.ckpt")
    assert_equal(read_whole(tmp_path / "last.ckpt"), checkpoint(3))
    assert_equal(RunCheckpointIO().load_checkpoint(tmp_path / "last.ckpt"), checkpoint(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"]


@given(st.permutations(["x", "y", "z"]), st.integers(0, 3))
def test_joining_undoes_splitting(order, cut):
    tensors = {name: torch.tensor(float(ord(name))) for name in "xyz"}
    numbered = {i: {"moment": tensors[name] + 1, "count": i} for i, name in enumerate(order)}
    groups = [{"lr": 1.0, "params": list(range(cut))}, {"lr": 2.0, "params": list(range(cut, 3))}]
    whole = {"state_dict": tensors, "optimizer_states": [{"state": numbered, "param_groups": groups}], "epoch": 1}
    assert_equal(join(*split(whole, [order])), whole)


class Killed(BaseException):
    """Ends a process where it stands."""


@pytest.mark.parametrize("save", [save_one_file, save_sharded])
def test_a_kill_at_any_moment_of_a_save_leaves_a_complete_checkpoint(tmp_path, monkeypatch, save):
    """Ended before every call that touches the disk: the last complete one is the previous or, at the end, the new."""
    found = []
    for moment in range(100):
        path = tmp_path / f"{moment}" / "last.ckpt"
        path.parent.mkdir()
        save(1, path)
        calls = 0

        def dying(function, moment=moment):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > moment:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"),
                                (Path, "open"), (torch, "save"), (shutil, "rmtree")):  # fmt: skip
                patch.setattr(owner, name, dying(getattr(owner, name)))
            with contextlib.suppress(Killed, CheckpointException):  # torch wraps what ends its own part
                save(2, path)
        found.append(read_summary(find_last(path.parent))["global_step"])
        save(3, path)  # and the next run can save again
        assert read_summary(find_last(path.parent))["global_step"] == 3
        if calls <= moment:
            break
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == 2
    assert len(found) > 4


@pytest.mark.parametrize("save", [save_one_file, save_sharded])
def test_truncated_checkpoints_are_passed_over(tmp_path, save):
    older, newer = tmp_path / "version_0", tmp_path / "version_1"
    for step, folder in enumerate((older, newer)):
        folder.mkdir()
        save(step, folder / "last.ckpt")
    damaged = newer / "last.ckpt" / META if save is save_sharded else newer / "last.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    os.utime(damaged, (2e9, 2e9))
    with pytest.warns(UserWarning, match=r"passed over: ckpt_path must be a checkpoint of nsa fit, got .*version_1"):
        assert find_last(tmp_path) == older / "last.ckpt"


def shard(path):
    (file,) = path.glob("*.distcp")
    return file


def size(path):
    return path.stat().st_size


DAMAGE = {
    "missing shard": (lambda path: shard(path).unlink(), "its file __0_0.distcp is missing"),
    "truncated shard": (
        lambda path: os.truncate(shard(path), shard(path).stat().st_size - 1),
        r"is truncated: \d+ bytes",
    ),
    "empty shard": (lambda path: os.truncate(shard(path), 0), r"is truncated: 0 bytes of"),
    "overwritten shard": (
        lambda path: shard(path).write_bytes(bytes(shard(path).stat().st_size)),
        "does not hold what",
    ),
    "no table of contents": (lambda path: (path / ".metadata").unlink(), ".metadata"),
    "empty table of contents": (lambda path: os.truncate(path / ".metadata", 0), "Ran out of input"),
    "no meta": (lambda path: (path / META).unlink(), f"lacks {META}"),
    "empty": (lambda path: [file.unlink() for file in path.iterdir()], f"lacks {META}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_passed_over_and_named_by_its_fault(tmp_path, damage):
    older, newer = tmp_path / "step1.ckpt", tmp_path / "step2.ckpt"
    for step, path in enumerate((older, newer)):
        save_sharded(step, path)
    os.utime(older / META, (1, 1))
    spoil, fault = DAMAGE[damage]
    spoil(newer)
    with pytest.warns(
        UserWarning, match=f"passed over: ckpt_path must be a checkpoint of nsa fit, got .*step2.*{fault}"
    ):
        assert find_last(tmp_path) == older
    with pytest.raises(ValueError, match=f"^checkpoint must be a checkpoint of nsa fit, got .*step2.ckpt.*{fault}"):
        read_summary(newer, "checkpoint")
    with pytest.raises(ValueError, match=f"^checkpoint must be .*step2.ckpt.*{fault}"):
        consolidate(newer, tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=fault):
        RunCheckpointIO().load_checkpoint(newer)
    assert not (tmp_path / "one.ckpt").exists()


def test_damage_that_reading_alone_finds_is_named(tmp_path):
    path = tmp_path / "step1.ckpt"
    save_sharded(1, path)
    content = bytearray(shard(path).read_bytes())
    content[100 : len(content) - 200] = bytes(len(content) - 300)
    shard(path).write_bytes(content)
    with pytest.raises(ValueError, match=r"^the checkpoint .*step1.ckpt is damaged: "):
        RunCheckpointIO().load_checkpoint(path)


def test_one_file_is_written_into_a_directory_that_is_made(tmp_path):
    save_sharded(1, tmp_path / "step1.ckpt")
    consolidate(tmp_path / "step1.ckpt", tmp_path / "new" / "one.ckpt")
    written = torch.load(tmp_path / "new" / "one.ckpt", weights_only=True)
    assert written.pop("run_files") == {}  # there is no run around it
    assert_equal(written, checkpoint(1))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"/file cannot be written: "):
        consolidate(tmp_path / "step1.ckpt", tmp_path / "file" / "one.ckpt")


@pytest.mark.parametrize("save", [save_one_file, save_sharded])
@pytest.mark.parametrize("other", [save_one_file, save_sharded])
def test_two_runs_that_write_to_one_name_do_not_break_each_others_saves(tmp_path, monkeypatch, save, other):
    """One saves whole while the other is about to put its own in its place."""
    path = tmp_path / "last.ckpt"
    save(1, path)
    fsync, process = os.fsync, os.getpid()

    def interrupted(descriptor):
        fsync(descriptor)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "getpid", lambda: process + 1)
            patch.setattr(atomic, "_is_running", lambda pid: pid in (process, process + 1))
            other(2, path)
            assert read_summary(path)["global_step"] == 2

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        save(3, path)
    assert read_summary(path)["global_step"] == 3
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_save_left_is_removed_and_nothing_that_is_being_written(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = socket.gethostname()
    names = {
        "last.ckpt.tmp": True,  # of an older version, long ago
        f"last.ckpt.{here}-{ended.pid}.tmp": True,
        f"last.ckpt.{here}-{ended.pid}.old": True,
        f"last.ckpt.{here}-1.tmp": False,
        "last.ckpt.else.where-7.tmp": False,
        "last.ckpt.long.ago-7.tmp": True,
        f"other.ckpt.{here}-{ended.pid}.tmp": False,  # another name: its own next save removes it
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").touch()
        if name.endswith(".ckpt.tmp") or "long.ago" in name:
            os.utime(tmp_path / name / "shard", (1, 1))
            os.utime(tmp_path / name, (1, 1))
    save_sharded(1, tmp_path / "last.ckpt")
    assert {name for name in names if not (tmp_path / name).exists()} == {name for name, gone in names.items() if gone}


def test_the_last_checkpoint_is_the_last_written_and_knows_the_best(tmp_path):
    assert find_last(tmp_path) is None
    assert find_best(tmp_path) is None
    best, last = tmp_path / "version_3" / "step000001.ckpt", tmp_path / "version_0" / "last.ckpt"
    save_one_file(1, best)
    content = checkpoint(2) | {"callbacks": {"RunCheckpoint": {"best_model_path": str(best)}}}
    RunCheckpointIO().save_checkpoint(content, last)
    os.utime(best, (1, 1))
    assert find_last(tmp_path) == last
    assert find_best(tmp_path) == best


@pytest.mark.parametrize("where", [".metadata", META])
def test_a_sharded_checkpoint_that_would_run_code_is_refused(tmp_path, where):
    class Stranger:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "touched"),)

    save_sharded(1, tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / where).write_bytes(pickle.dumps(Stranger()))
    with pytest.raises(ValueError, match="ckpt_path must be a checkpoint of nsa fit, got "):
        read_summary(tmp_path / "last.ckpt")
    assert not (tmp_path / "touched").exists()
