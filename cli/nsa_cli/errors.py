"""What the user reads when a command ends in a mistake, and which errors of libraries are one."""

import errno
import os
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

from nsa_kernels.errors import SettingError


class _Known(NamedTuple):
    """An error of a library that a setting or the machine causes, by its type and by what raises it."""

    error: str  # a class in its method resolution order, with its module
    places: tuple[str, ...]  # modules with all that are in them, or a function after a colon; empty: anywhere
    advice: str = ""


_MISCONFIGURATION = "lightning.fabric.utilities.exceptions.MisconfigurationException"
_TRAINER_ARGUMENTS = (
    "lightning.pytorch.trainer.setup",
    "lightning.pytorch.trainer.connectors.accelerator_connector",
    "lightning.pytorch.trainer.connectors.callback_connector",
    "lightning.pytorch.trainer.connectors.data_connector",
    "lightning.pytorch.loops.utilities",
    "lightning.pytorch.loops.fit_loop:setup_data",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.plugins",
    "lightning.pytorch.strategies",
    "lightning.fabric.accelerators",
    "lightning.fabric.connector",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "lightning.fabric.utilities.device_parser",
    "lightning.fabric.utilities.seed",
)
_COMPONENTS = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "lightning.fabric.loggers",
)
_KNOWN = (
    # Not what Lightning says of a module, a dataset or a call of `self.log`: those are programming errors.
    _Known(_MISCONFIGURATION, (*_TRAINER_ARGUMENTS, *_COMPONENTS)),
    _Known(_MISCONFIGURATION, ("lightning.pytorch.trainer.trainer:__init__",)),
    _Known("builtins.ValueError", _TRAINER_ARGUMENTS),
    _Known("builtins.TypeError", ("lightning.fabric.utilities.device_parser", "lightning.fabric.accelerators")),
    _Known("builtins.RuntimeError", ("lightning.pytorch.callbacks.early_stopping:_validate_condition_metric",)),
    _Known("builtins.RuntimeError", ("lightning.fabric.plugins.environments.slurm:_validate_srun_variables",)),
    _Known("builtins.ModuleNotFoundError", _COMPONENTS),
    _Known("builtins.ModuleNotFoundError", ("lightning.fabric.strategies", "lightning.pytorch.strategies")),
    _Known("argparse.ArgumentError", ("jsonargparse",)),
    _Known(
        "torch.OutOfMemoryError",
        (),
        "; nsa memory, with the same settings, tells what a step needs",
    ),
)
_WRITERS = ("lightning", "tensorboard", "torch.utils.tensorboard", "torch.serialization", "fsspec", "jsonargparse")
"""Packages whose `OSError` is of a file that a setting has named."""
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What no program can help: the disk is full, or the file must not be written."""


def print_error(command: str, message: str) -> None:
    """One line on stderr, after the command that the user typed."""
    print(f"nsa {command}: error: {message}", file=sys.stderr)


def user_message(error: Exception) -> str | None:
    """The line that says a mistake of the user's, or None for a programming error, which keeps its traceback.

    A `SettingError` is one, whoever raises it. Errors of libraries are known by their type together with what has
    raised them: the same type raised by our own code or by the user's is a programming error.
    """
    if isinstance(error, SettingError):
        return str(error)
    found = _beneath_parser(error)
    if isinstance(found, SettingError):
        return str(found)
    places = list(_places(found))
    for known in _KNOWN:
        if known.error in _type_names(found) and _raised_in(places, known.places):
            return f"{_line(found)}{known.advice}"
    if isinstance(found, OSError) and (found.errno in _MACHINE or _raised_in(places, _WRITERS)):
        return f"{_file(found) or 'a file'} cannot be written or read: {found.strerror or found}"
    return None


def silence_threads() -> None:
    """Leave out the traceback of a writer's thread whose error the main thread raises again and says in a line."""
    default = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        error = failed.exc_value
        known = isinstance(error, OSError) and _raised_in(list(_places(error)), ("tensorboard",))
        if not known:
            default(failed)

    threading.excepthook = hook


def _file(error: OSError) -> str | None:
    """The file that could not be written; a failed write does not know, but what called it may."""
    if error.filename:
        return str(error.filename)
    traceback, name = error.__traceback__, None
    while traceback is not None:
        found = traceback.tb_frame.f_locals.get("filename")
        name = os.fsdecode(found) if isinstance(found, str | bytes | os.PathLike) else name
        traceback = traceback.tb_next
    return name


def _beneath_parser(error: BaseException) -> BaseException:
    """What jsonargparse has wrapped when a class could not be made."""
    while _raised_in(list(_places(error)), ("jsonargparse",)):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def _type_names(error: BaseException) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def _places(error: BaseException) -> Iterator[tuple[str, str]]:
    """Module and function of the frames that an error came through, the one that raised it last."""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        traceback = traceback.tb_next


def _raised_in(places: list[tuple[str, str]], allowed: tuple[str, ...]) -> bool:
    """Whether the last frame that is not of Python's own library belongs to a place."""
    if not allowed:
        return True
    own = [place for place in places if place[0].partition(".")[0] not in sys.stdlib_module_names]
    if not own:
        return False
    module, function = own[-1]
    for place in allowed:
        name, _, only = place.partition(":")
        if (module == name or module.startswith(f"{name}.")) and only in ("", function):
            return True
    return False


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
