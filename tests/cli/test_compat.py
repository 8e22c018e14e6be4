"""The private parts of Lightning, jsonargparse and argparse that the command line uses do what is relied on."""

import argparse
import sys

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from nsa_cli import compat
from nsa_cli.lightning_compat import TrainerCommandLine


class Model(LightningModule):
    """A model with a setting."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.size = size


class Extra(Callback):
    """A callback with settings of its own."""

    def __init__(self, number: int = 3) -> None:
        self.number = number


class Default(Callback):
    """A callback that every run has."""


class CommandLine(TrainerCommandLine):
    """Notes what Lightning asks of it."""

    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(Extra, "extra")

    def make_trainer(self, config, callbacks):
        self.callbacks, self.given = list(callbacks), dict(config)
        return super().make_trainer(config, callbacks)

    def run_command(self, command):
        self.command = command


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["nsa", *words])
        defaults = {"callbacks": [Default()], "logger": False, "accelerator": "cpu", "default_root_dir": tmp_path}
        return CommandLine(Model, trainer_defaults=defaults, save_config_callback=None, auto_configure_optimizers=False)

    return parse


def test_lightning_has_the_trainer_made_and_the_command_run_by_the_subclass(command_line):
    made = command_line("fit", "--trainer.max_steps=7", "--extra.number=5")
    assert made.command == "fit"
    assert [callback.number for callback in made.callbacks] == [5]
    assert made.given["max_steps"] == made.trainer.max_steps == 7
    assert {Extra, Default} <= {type(callback) for callback in made.trainer.callbacks}
    assert made.trainer.state.fn is None  # nothing was run


def test_lightnings_own_run_of_a_command_calls_the_trainers_method(command_line, monkeypatch):
    called = []
    monkeypatch.setattr(Trainer, "validate", lambda trainer, *args, **settings: called.append(settings))
    made = command_line("validate")
    TrainerCommandLine.run_command(made, "validate")
    assert [settings["model"] for settings in called] == [made.model]


def test_the_settings_in_a_checkpoint_are_not_read(command_line, tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    torch.save({"hyper_parameters": {"size": 4}}, path)
    made = command_line("validate", f"--ckpt_path={path}")
    assert made.model.size == 1
    monkeypatch.setattr(CommandLine, "_parse_ckpt_path", LightningCLI._parse_ckpt_path)
    assert command_line("validate", f"--ckpt_path={path}").model.size == 4  # what is turned off


def test_jsonargparse_keeps_the_type_of_an_argument_and_reads_it_as_another_one():
    parser = ArgumentParser()
    action = parser.add_argument("--rate", type=float | int)
    assert set(compat.type_of(action).__args__) == {float, int}
    compat.set_type(action, list[int] | None)
    assert compat.type_of(action) == list[int] | None
    assert parser.parse_args(["--rate=[1, 2]"]).rate == [1, 2]
    assert compat.type_of(argparse.ArgumentParser().add_argument("--plain")) is None


def test_argparse_lists_arguments_flags_and_subcommands():
    inner = ArgumentParser()
    inner.add_argument("--inner", type=list[int])
    parser = ArgumentParser()
    parser.add_argument("-o", "--outer", type=int)
    parser.add_subcommands().add_subcommand("do", inner)
    assert "outer" in [action.dest for action in compat.arguments(parser)]
    assert {"-o", "--outer", "--help"} <= set(compat.option_strings(parser))
    assert {"--inner", "--inner+"} <= set(compat.option_strings(inner))
    assert list(compat.subcommand_parsers(parser)) == [inner]
