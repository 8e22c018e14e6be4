"""Lines that a run gathers, as a file."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from nsa_lightning.checkpoint.run_files import directory_of_run
from nsa_lightning.data.storage import whole_file, writable
from nsa_lightning.paths import expand_path, relative
from nsa_lightning.training.strategy import ranks_a_batch


def write_lines(trainer: Trainer, lines: list[str], path: str | None, name: str, what: str) -> None:
    """Write the lines of each rank to a file of its own, whole or not at all, and say what is where.

    Every rank calls it. Of ranks that share their batches the first writes.

    Args:
        trainer: of the run.
        lines: of this rank.
        path: file to write. If None, `name` in the log directory of a logger that has one for each version; else with
            the run whose checkpoint is measured, in `predictions/` and there by the checkpoint's name.
        name: of the file.
        what: a line is, for the user.
    """
    directory = _directory(trainer)  # asks the other ranks, so on every rank
    if trainer.global_rank % ranks_a_batch(trainer):
        return
    file = Path(expand_path(path)) if path is not None else directory / name
    if trainer.world_size > 1:
        file = file.with_name(f"{file.stem}.rank{trainer.global_rank}{file.suffix}")
    with writable(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as stream:
        stream.write("".join(f"{line}\n" for line in lines).encode())
    print(f"{len(lines)} {what}: {relative(file)}")


def _directory(trainer: Trainer) -> Path:
    if trainer.loggers and isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
        return Path(trainer.log_dir or "")
    if trainer.ckpt_path is not None:
        checkpoint = Path(trainer.ckpt_path)
        return directory_of_run(checkpoint) / "predictions" / checkpoint.stem
    return Path(trainer.default_root_dir)
