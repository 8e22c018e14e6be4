"""What a prepared set depends on: planned from names and sizes, kept in the set, and compared when it is taken up."""

import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from nsa_kernels.errors import SettingError

from nsa_lightning.data.documents import PartRead, holds_still
from nsa_lightning.data.settings import CHOICE, TextSettings
from nsa_lightning.data.shards import parts_of_shard, permutation, shard_path
from nsa_lightning.data.sources import Part, SourceFile, find_files, parts_of
from nsa_lightning.data.storage import whole_file, writable
from nsa_lightning.data.token_store import FORMAT_VERSION
from nsa_lightning.data.tokenizer import Tokenizer, load_tokenizer

SHARD_SIZE = 2**27
PARTS_A_SHARD = 8  # that a long file is cut in: each shard mixes parts of several places

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a prepared set depends on."""

    text: TextSettings
    files: list[SourceFile]
    tokenizer: Tokenizer | None  # None: one is trained
    seed: int  # shuffles the documents
    shard_size: int  # bytes of text that are tokenised, shuffled and held in memory at a time

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings that a set must have been prepared with, by name; its files are compared one by one."""
        kept = {each.name: getattr(self.text, each.name) for each in fields(self.text) if each.name not in CHOICE}
        trained = f"trained, vocab_size {self.text.tokenizer.vocab_size}"
        kept["tokenizer"] = trained if self.tokenizer is None else self.tokenizer.fingerprint
        return {"format_version": FORMAT_VERSION, **kept, "seed": self.seed, "shard_size": self.shard_size}

    @property
    def fingerprint(self) -> str:
        """Changes with any setting, and with the name, size or time of modification of any file."""
        return hashlib.blake2b(json.dumps([self.settings, self.files]).encode(), digest_size=12).hexdigest()

    def parts(self) -> list[Part]:
        """What is read of all files at a time."""
        size = max(self.shard_size // PARTS_A_SHARD, 1)
        return list(itertools.chain.from_iterable(parts_of(file, size) for file in self.files))

    def shards(self, kept: Sequence[list[Part]] = ()) -> list[list[Part]]:
        """The parts that make each shard: those of `kept`, and the others shuffled by the seed.

        A shard has about `shard_size` bytes of text.
        """
        taken = set(itertools.chain.from_iterable(kept))
        parts = [part for part in self.parts() if part not in taken]
        shards: list[list[Part]] = []
        room = 0
        for index in permutation(len(parts), (self.seed, len(parts))):
            part = parts[index]
            if not shards or part.size > room:
                shards.append([])
                room = self.shard_size
            shards[-1].append(part)
            room -= part.size
        return [*kept, *shards]


def make_plan(text: TextSettings, *, seed: int = 0, shard_size: int = SHARD_SIZE) -> Plan:
    """Look what there is to prepare. Nothing is read but names, sizes and times of modification.

    Args:
        text: what is read, and how.
        seed: shuffles the documents.
        shard_size: bytes of text that are tokenised, shuffled and held in memory at a time.

    Raises:
        ValueError: a setting is out of its range, a source matches no file, or the tokenizer cannot be opened.
    """
    for name, least, value in (("seed", 0, seed), ("shard_size", 1, shard_size)):
        if value < least:
            raise SettingError(f"data.{name} must be at least {least}, got {value}")
    asked = text.tokenizer
    opened = load_tokenizer(asked.path, asked.end_of_text) if asked.path is not None else None
    files = find_files(text.sources, text.include, text.exclude)
    return Plan(text=text, files=files, tokenizer=opened, seed=seed, shard_size=shard_size)


class OldPlan(NamedTuple):
    """What an earlier call wrote of its plan."""

    files: dict[str, list[Any]]  # size and version, by name
    kept: list[list[Part]]  # the parts of the first shards, where they were made for other files


def write_plan(plan: Plan, path: Path, kept: list[list[Part]]) -> None:
    """Keep a plan in the set at `path`, with the parts of the first shards where they were made for other files."""
    with whole_file(path / "plan.json") as stream:
        state = {"settings": plan.settings, "files": plan.files, "kept": kept}
        stream.write(json.dumps(state, indent=0).encode())


def read_plan(plan: Plan, path: Path) -> OldPlan:
    """The plan of the set at `path`; one with other settings is refused."""
    try:
        state = json.loads((path / "plan.json").read_bytes())
        settings, files = state["settings"], {name: rest for name, *rest in state["files"]}
        old = OldPlan(files, [[Part(*part) for part in parts] for parts in state.get("kept", [])])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path / 'plan.json'} is not the plan of a prepared set: {error!r}; {_another(path)}"
        ) from error
    for name, value in plan.settings.items():
        if settings.get(name) != value:
            raise SettingError(
                f"{path} was prepared with {name}={settings.get(name)!r}, got {value!r}; {_another(path)}"
            )
    return old


def changes(plan: Plan, old: OldPlan, path: Path) -> str:
    """How the files differ from those of the old plan; nothing if they do not."""
    now = {name: rest for name, *rest in plan.files}
    changed = [name for name in old.files.keys() & now.keys() if old.files[name] != now[name]]
    kinds = {"changed": changed, "gone": old.files.keys() - now.keys(), "new": now.keys() - old.files.keys()}
    words = [f"{len(names)} files are {kind}, such as {min(names)}" for kind, names in kinds.items() if names]
    return f"{path} was prepared from other files: {'; '.join(words)}; {_another(path)}" if words else ""


def take_up(plan: Plan, path: Path) -> list[list[Part]]:
    """The shards of an unfinished set that are kept because its files have changed since; nothing if they have not.

    A shard is kept where its parts are parts of the plan too, and those of changed files hold the same documents. It
    takes a low number, and what is left is laid in shards anew.
    """
    old = read_plan(plan, path)
    words = changes(plan, old, path)
    if not words:
        return old.kept
    planned, now = set(plan.parts()), {name: rest for name, *rest in plan.files}

    def fits(found: PartRead) -> bool:
        name = found.part.name
        same_file = old.files.get(name) == now.get(name)
        return found.part in planned and (same_file or holds_still(found, plan.text))

    folders = [folder for folder in path.glob("shards/*") if folder.name.isdecimal()]
    folders.sort(key=lambda folder: int(folder.name))
    made = {folder: parts for folder in folders if (parts := parts_of_shard(folder))}
    fitting = {folder: parts for folder, parts in made.items() if all(map(fits, parts))}
    if made and not fitting:
        raise SettingError(words)
    log.warning("%s: its files have changed, %d of %d shards are used again", path, len(fitting), len(made))
    kept = [[each.part for each in parts] for parts in fitting.values()]
    write_plan(plan, path, kept)
    with writable(path):
        for folder in folders:
            if folder not in fitting:
                shutil.rmtree(folder)
        for number, folder in enumerate(fitting):
            folder.rename(shard_path(path, number))
        if not kept:  # a tokenizer that was trained has seen the files of the old plan
            (path / "tokenizer.json").unlink(missing_ok=True)
    return kept


def _another(path: Path) -> str:
    return f"choose another directory, or delete {path}"
