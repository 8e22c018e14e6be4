"""`nsa prepare`: sources to a prepared set."""

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nsa_kernels.errors import SettingError

from nsa_cli.function_command import run_function
from nsa_lightning.data.plan import SHARD_SIZE, make_plan
from nsa_lightning.data.prepare import prepare
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.storage import is_url
from nsa_lightning.data.token_store import TokenStore
from nsa_lightning.paths import expand_path, relative


def prepare_texts(
    output_dir: str,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    num_workers: int | None = None,
    verify: bool = False,
    **text: Any,
) -> int:
    """Tokenise sources into a prepared set, for `--data.prepared DIR` of nsa fit.

    Run again after a stop, the same command goes on: shards that are whole are kept. The set is the same for any number
    of workers and stops. Its directory can be copied anywhere, object storage included, and is read there by its URL.

    Args:
        output_dir: directory of the set. With verify also a URL.
        seed: shuffles the documents.
        shard_size: bytes of text in a shard. What a worker holds in memory grows with it and with the longest document.
        num_workers: processes, one shard each at a time; 0 works in this one. Left out: one a core, at most 8.
        verify: prepare nothing, compare every file of the set with its checksum.
        text: what is read, and how.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: a setting is out of its range, or a file cannot be read or written.
    """
    settings = TextSettings(**text)
    output_dir = expand_path(output_dir)
    if verify:
        with TemporaryDirectory() as cache_dir:
            TokenStore(output_dir, Path(cache_dir)).verify()
        print(f"{output_dir}: every file is as it was written")
        return 0
    if not settings.sources:
        raise SettingError("sources must name files, directories, globs or URLs, got none")
    if is_url(output_dir):
        raise SettingError(
            f"output_dir must be a local directory, got {output_dir}: copy the set there when it is whole"
        )
    plan = make_plan(settings, seed=seed, shard_size=shard_size)
    print(_summary(prepare(plan, Path(output_dir), num_workers)))
    return 0


def _summary(store: TokenStore) -> str:
    manifest = store.manifest
    lines = [f"{'split':<7}{'documents':>14}{'tokens':>18}{'bytes of text':>18}"]
    for name, size in manifest.splits.items():
        lines.append(f"{name:<7}{size.documents:>14,}{size.tokens:>18,}{size.bytes:>18,}")
    lines.append(f"tokenizer {manifest.tokenizer}, vocabulary {manifest.vocab_size:,}")
    lines.append(
        f"data {manifest.fingerprint}, {len(manifest.shards)} shards, {manifest.empty_documents:,} empty documents"
    )
    for split, fraction in {"val": manifest.val_fraction, "test": manifest.test_fraction}.items():
        if fraction and not manifest.splits[split].documents:
            lines.append(
                f"no document fell to {split}: raise --{split}_fraction, {fraction:g} here, set it to 0 or "
                "prepare more documents"
            )
    if not manifest.splits["train"].documents:
        lines.append("no document fell to train: lower --val_fraction and --test_fraction, or prepare more documents")
    elif manifest.splits["val"].documents or not manifest.val_fraction:  # else nsa fit refuses the set
        lines.append(f"train on it: nsa fit {_settings_of_a_fit()} --data.prepared {shlex.quote(str(store.path))}")
    return "\n".join(lines)


def _settings_of_a_fit() -> str:
    """A config of ours that is there, or the least that `nsa fit` needs."""
    ours = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    if not ours.is_file():  # they do not come with an installed package
        return "--trainer.max_steps 1000"
    return f"--config {shlex.quote(str(relative(ours)))}"


def run() -> int:
    """Prepare what `sys.argv` says; returns the exit status, 2 for a mistake in the settings."""
    return run_function("prepare", prepare_texts, sys.argv[2:] or ["--help"])
