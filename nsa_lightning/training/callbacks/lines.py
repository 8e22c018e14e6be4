"""Lines that a run gathers, as a file."""

from pathlib import Path

from lightning.pytorch import Trainer

from nsa_lightning.data.storage import whole_file
from nsa_lightning.training.strategy import ranks_a_batch


def write_lines(trainer: Trainer, lines: list[str], path: str | None, name: str, what: str) -> None:
    """Write the lines of each rank to a file of its own, whole or not at all, and say what is where.

    Every rank calls it. Of ranks that share their batches the first writes.

    Args:
        trainer: of the run.
        lines: of this rank.
        path: file to write; `name` in the log directory if None.
        name: of the file.
        what: a line is, for the user.
    """
    log_dir = trainer.log_dir  # asks the other ranks, so on every rank
    if trainer.global_rank % ranks_a_batch(trainer):
        return
    file = Path(path or Path(log_dir or trainer.default_root_dir, name))
    if trainer.world_size > 1:
        file = file.with_name(f"{file.stem}.rank{trainer.global_rank}{file.suffix}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as stream:
        stream.write("".join(f"{line}\n" for line in lines).encode())
    print(f"{len(lines)} {what}: {file}")
