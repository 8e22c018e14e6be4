"""A user's mistake is one line, also where a library finds it; a programming error keeps its traceback."""

import errno
import resource
from contextlib import contextmanager

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from nsa_cli.errors import user_message
from nsa_kernels.errors import SettingError
from support.command_line import LOGGED, run_small

from nsa_lightning.checkpoint.atomic import save_file
from nsa_lightning.data.storage import writable
from nsa_lightning.training.callbacks import Continuations, DocumentScores, LossGuard, RunCheckpoint, TokenThroughput
from nsa_lightning.training.module import LanguageModel


@contextmanager
def full_disk(size):
    """No file may become larger, as on a disk with no room left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("accumulate_grad_batches", "0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
        ("val_check_interval", "0", "trainer.val_check_interval must be a number of batches of at least 1"),
        ("check_val_every_n_epoch", "-1", "trainer.check_val_every_n_epoch must be at least 1, got -1"),
        ("gradient_clip_val", "-1", "trainer.gradient_clip_val must be at least 0"),
        ("log_every_n_steps", "-1", "trainer.log_every_n_steps must be at least 0, got -1"),
        ("max_time", "00:00:00:00", "trainer.max_time must be above 0, got 0:00:00"),
        ("max_epochs", "0", "trainer.max_epochs must be at least 1, or -1 for no limit, got 0"),
        ("limit_train_batches", "0", "trainer.limit_train_batches must be above 0 for nsa fit, got 0"),
        ("limit_val_batches", "1.5", "trainer.limit_val_batches must be at most 1.0 where it is a fraction, got 1.5"),
        ("num_nodes", "0", "trainer.num_nodes must be at least 1, got 0"),
        ("strategy", "foo", "invalid strategy name: `strategy='foo'`"),
        ("accelerator", "foo", "invalid accelerator name: `accelerator='foo'`"),
        ("devices", "0", "devices='0'"),
        ("devices", "-3", "should be an int > 0"),
        ("gradient_clip_algorithm", "foo", "`gradient_clip_algorithm` foo is invalid"),
        ("profiler", "foo", "it can only be one of"),
        ("logger", "CometLogger", "Requirement 'comet-ml"),
        ("logger.save_dir", "/proc/nowhere", "/proc/nowhere cannot be written"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_trainers_settings_is_one_line(workplace, monkeypatch, capsys, setting, value, message):
    logger = LOGGED if setting == "logger.save_dir" else ()
    assert run_small(monkeypatch, "fit", *logger, f"--trainer.{setting}", value) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_tasks_of_slurm_that_lightning_cannot_place_are_one_line(workplace, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    assert run_small(monkeypatch, "fit") == 2
    assert "Use `--ntasks-per-node=2` instead" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.optimizer.lr", "-1"], "model.optimizer: invalid learning rate: -1.0"),
        (["--model.optimizer.lr", "0"], "model.optimizer.lr must be above 0 and finite, got 0"),
        (["--model.optimizer.weight_decay", "-1"], "model.optimizer: invalid weight_decay value: -1.0"),
        (["--model.optimizer.betas", "[2, 0.9]"], "model.optimizer: invalid beta parameter at index 0: 2.0"),
        (["--throughput.window_size", "1"], "throughput.window_size must be at least 2, got 1"),
        (["--checkpoint.save_top_k", "-2"], "save_top_k=-2"),
        (["--checkpoint.every_n_train_steps", "-1"], "every_n_train_steps=-1"),
        (["--seed_everything", "-1"], "seed_everything must be from 0 to 4294967295, got -1"),
        (["--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "9999"], "`val_check_interval`"),
        (["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "foo"], "metric `foo`"),
    ],
)
def test_a_mistake_in_what_a_run_is_made_of_is_one_line(workplace, monkeypatch, capsys, arguments, message):
    assert run_small(monkeypatch, "fit", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "error"),
    [("zip", ValueError), ("misconfiguration", MisconfigurationException), ("log", MisconfigurationException)],
)
def test_a_programming_error_keeps_its_traceback(workplace, monkeypatch, kind, error):
    callback = ("--trainer.callbacks", "support.command_line.FailingCallback", "--trainer.callbacks.kind", kind)
    with pytest.raises(error):
        run_small(monkeypatch, "fit", *callback)


def test_measuring_nothing_is_refused(workplace, monkeypatch, capsys):
    words = ("--ckpt_path", "x.ckpt", "--trainer.limit_val_batches", "0")
    assert run_small(monkeypatch, "validate", *words) == 2
    assert "trainer.limit_val_batches must be above 0 for nsa validate, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("create", "name"),
    [
        (lambda: TokenThroughput(window_size=0), "throughput.window_size"),
        (lambda: DocumentScores(preview_characters=-1), "document_scores.preview_characters"),
        (lambda: Continuations(max_new_tokens=0), "generate.max_new_tokens"),
        (lambda: LossGuard(spike_ratio=float("nan")), "loss_guard.spike_ratio"),
        (lambda: RunCheckpoint(last_every_n_steps=0), "checkpoint.last_every_n_steps"),
        (lambda: LanguageModel(optimizer=lambda params: torch.optim.SGD(params, lr=0.0)), "model.optimizer.lr"),
    ],
)
def test_our_classes_refuse_zeros_and_signs_from_python_too(create, name):
    with pytest.raises(SettingError, match=name):
        create()


def test_a_full_disk_names_the_file_and_leaves_the_last_checkpoint_alone(tmp_path):
    path = tmp_path / "last.ckpt"
    save_file({"step": 1}, path)
    with full_disk(20_000), pytest.raises(SettingError, match=r"last\.ckpt cannot be written: File too large"):
        save_file({"step": 2, "weights": torch.zeros(100_000)}, path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_run_on_a_full_disk_ends_in_one_line_without_litter(workplace, monkeypatch, capsys):
    assert run_small(monkeypatch, "fit", *LOGGED) == 0
    capsys.readouterr()
    with full_disk(20_000):
        assert run_small(monkeypatch, "fit", *LOGGED, "--trainer.max_steps", "6") == 2
    assert "cannot be written: File too large" in capsys.readouterr().err.splitlines()[-1]
    assert len(list(workplace.glob("runs/**/*.ckpt"))) == 2
    assert not list(workplace.rglob("*.tmp*"))


def test_too_little_memory_is_a_line_that_names_the_remedy():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert user_message(caught.value) == (
        "CUDA out of memory. Tried to allocate 2 GiB; nsa memory, with the same settings, tells what a step needs"
    )


def test_an_error_beside_a_file_is_not_taken_for_one_of_it(tmp_path):
    def fail():
        try:
            raise FileNotFoundError(errno.ENOENT, "No such file", "b")
        except FileNotFoundError:
            raise KeyError("c")  # noqa: B904 (a programming error)

    with pytest.raises(KeyError), writable(tmp_path / "a"):
        fail()


def test_only_what_the_machine_or_a_library_says_of_a_file_is_a_line():
    def raised(error):
        try:
            raise error
        except OSError as caught:
            return user_message(caught)

    assert raised(OSError(errno.ENOSPC, "No space left on device", "a")) == (
        "a cannot be written or read: No space left on device"
    )
    assert raised(FileNotFoundError(errno.ENOENT, "No such file", "a")) is None  # in our own code: ours to answer for
