import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from select import select
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.data import prepare as module
from nsa_lightning.data import workers
from nsa_lightning.data.plan import Plan, make_plan
from nsa_lightning.data.prepare import prepare
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.shards import _ShardWriter
from nsa_lightning.data.sources import Part, SourceFile
from nsa_lightning.data.splits import SPLITS, split_of
from nsa_lightning.data.token_store import TokenStore
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

TRAINED = TokenizerConfig(vocab_size=300)
FRACTIONS = {"val_fraction": 0.2, "test_fraction": 0.1}


@pytest.fixture
def plan_of(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Plan]:
    """Plans of the small corpus, cut in a handful of shards."""
    tokenizer.save(tmp_path / "given.json")

    def make(**settings: Any) -> Plan:
        own = {name: settings.pop(name) for name in ("seed", "shard_size") if name in settings}
        text = {"tokenizer": TokenizerConfig(path=str(tmp_path / "given.json")), **FRACTIONS, **settings}
        return make_plan(TextSettings(sources=[str(corpus)], **text), **{"shard_size": 2000, **own})

    return make


def files(path: Path) -> dict[str, bytes]:
    """Everything in a set but the lock."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def texts(store: TokenStore) -> list[str]:
    tokenizer = store.load_tokenizer()
    parts = [store.split(name) for name in SPLITS]
    return sorted(
        tokenizer.decode(part.read(part.offsets[i : i + 1], np.diff(part.offsets)[i : i + 1]).tolist())
        for part in parts
        for i in range(part.num_documents)
    )


def test_a_set_holds_every_document_once(plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path) -> None:
    plan = plan_of(tokenizer=TRAINED)
    store = prepare(plan, tmp_path / "set", num_workers=0)
    assert len(store.manifest.shards) == len(plan.shards()) > 5
    assert texts(store) == sorted(path.read_text() for path in corpus.iterdir())
    assert (store.manifest.val_fraction, store.manifest.test_fraction) == (0.2, 0.1)
    store.verify()


def test_the_set_is_the_same_for_any_number_of_workers(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SMALL", 0)
    prepare(plan_of(), tmp_path / "0", num_workers=0)
    prepare(plan_of(), tmp_path / "2", num_workers=2)
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_other_seeds_and_shards_order_the_same_documents_otherwise(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plans = [plan_of(), plan_of(seed=1), plan_of(shard_size=4000)]
    stores = [prepare(plan, tmp_path / str(i), num_workers=0) for i, plan in enumerate(plans)]
    assert texts(stores[0]) == texts(stores[1]) == texts(stores[2])
    assert len({store.fingerprint for store in stores}) == len({plan.fingerprint for plan in plans}) == 3


def test_a_corpus_elsewhere_gives_the_same_data(plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path) -> None:
    first = prepare(plan_of(), tmp_path / "set", num_workers=0)
    corpus.rename(tmp_path / "elsewhere")
    config = TokenizerConfig(path=str(tmp_path / "given.json"))
    text = TextSettings(sources=[str(tmp_path / "elsewhere")], tokenizer=config, **FRACTIONS)
    again = make_plan(text, shard_size=2000)
    assert prepare(again, tmp_path / "again", num_workers=0).fingerprint == first.fingerprint


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 200), st.integers(0, 3))
def test_every_part_lies_in_one_shard_and_no_shard_is_overfull(sizes: list[int], shard_size: int, seed: int) -> None:
    plan = Plan(
        text=TextSettings(),
        files=[SourceFile(f"/{i}.txt", size, "") for i, size in enumerate(sizes)],
        tokenizer=None,
        seed=seed,
        shard_size=shard_size,
    )
    shards = plan.shards()
    assert sorted(part for shard in shards for part in shard) == sorted(
        Part(f"/{i}.txt", 0, None, size) for i, size in enumerate(sizes)
    )
    assert all(shard for shard in shards)
    assert all(len(shard) == 1 or sum(part.size for part in shard) <= shard_size for shard in shards)


def test_a_second_call_opens_what_is_there(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(plan_of(), tmp_path / "set", num_workers=0)
    monkeypatch.setattr("nsa_lightning.data.workers.read_parts", None)
    assert prepare(plan_of(), tmp_path / "set").manifest == first.manifest


@pytest.mark.parametrize("damage", ["gone", "truncated", "leftover"])
def test_a_stopped_run_is_taken_up_where_it_was(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    prepare(plan_of(), tmp_path / "set", num_workers=0)
    whole = files(tmp_path / "set")
    shard = tmp_path / "set" / "shards" / "00003"
    (tmp_path / "set" / "manifest.json").unlink()
    if damage == "gone":
        shutil.rmtree(shard)
    elif damage == "truncated":
        (shard / "train.bin").write_bytes(b"cut")
    else:
        shard.rename(shard.with_name("00003.tmp-1"))
    made: list[str] = []
    write = workers.write_shard
    monkeypatch.setattr(workers, "write_shard", lambda path, *a, **k: [made.append(path.name), write(path, *a, **k)])
    prepare(plan_of(), tmp_path / "set", num_workers=0)
    assert made == ["00003"]
    assert files(tmp_path / "set") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was prepared with seed=0, got 1"),
        ({"val_fraction": 0.1}, "was prepared with val_fraction=0.2, got 0.1"),
        ({"text_field": "body"}, "was prepared with text_field='text', got 'body'"),
        ({"tokenizer": TRAINED}, r"was prepared with tokenizer='\w+', got 'trained, vocab_size 300'"),
    ],
)
def test_another_plan_is_refused_and_named(
    plan_of: Callable[..., Plan], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    prepare(plan_of(), tmp_path / "set", num_workers=0)
    for _ in "whole", "stopped":
        with pytest.raises(ValueError, match=f"{message}; choose another directory, or delete {tmp_path}/set"):
            prepare(plan_of(**change), tmp_path / "set", num_workers=0)
        (tmp_path / "set" / "manifest.json").unlink(missing_ok=True)


def test_changed_and_new_files_of_a_whole_set_are_named(
    plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path
) -> None:
    prepare(plan_of(), tmp_path / "set", num_workers=0)
    with pytest.raises(ValueError, match=r"other files: 2 files are gone, such as .*/00.txt; choose another directory"):
        prepare(plan_of(exclude=["00.txt", "01.txt"]), tmp_path / "set", num_workers=0)
    os.utime(corpus / "07.txt", ns=(1, 1))
    (corpus / "new.txt").write_text("new")
    with pytest.raises(
        ValueError, match=r"1 files are changed, such as .*/07.txt; 1 files are new, such as .*/new.txt"
    ):
        prepare(plan_of(), tmp_path / "set", num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_document_is_named_and_whole_shards_are_kept(
    plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(workers, "SMALL", 0)
    plan = plan_of()
    bad = plan.shards()[-1][-1].name
    Path(bad).write_bytes(b"\xff" + Path(bad).read_bytes()[1:])
    with pytest.raises(
        ValueError, match=rf"{bad} is not UTF-8 text: .* \d+ of \d+ shards are whole and kept"
    ) as caught:
        prepare(plan, tmp_path / "set", num_workers)
    assert "--num_workers" not in str(caught.value)
    assert not list((tmp_path / "set").rglob("*.tmp-*"))
    assert not (tmp_path / "set" / "manifest.json").exists()
    Path(bad).write_text("mended")
    assert "mended" in texts(prepare(plan, tmp_path / "set", num_workers=0))


class StoppedError(Exception):
    """Ends a run where a test wants it to."""


@pytest.fixture
def made_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Prepares up to the shard `stop`, and tells which shards it made."""
    write = workers.write_shard

    def run(plan: Plan, path: Path, stop: int = 10**6) -> list[str]:
        made: list[str] = []

        def counted(folder: Path, *arguments: Any, **options: Any) -> None:
            if len(made) == stop:
                raise StoppedError
            made.append(folder.name)
            write(folder, *arguments, **options)

        with monkeypatch.context() as patch, suppress(StoppedError):
            patch.setattr(workers, "write_shard", counted)
            prepare(plan, path, num_workers=0)
        return made

    return run


def rows(corpus: Path, name: str, lines: list[str]) -> None:
    (corpus / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


@pytest.mark.parametrize("change", ["mended", "removed", "appended", "added", "rewritten", "mended twice"])
def test_whole_shards_that_still_fit_are_used_again_when_files_have_changed(
    plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path, made_of: Callable[..., list[str]], change: str
) -> None:
    """`long.jsonl` has parts in every shard."""
    lines = [f"line {i} " * 40 for i in range(60)]
    rows(corpus, "long.jsonl", lines)
    plan = plan_of()
    assert made_of(plan, tmp_path / "set", stop=6) == [f"{i:05}" for i in range(6)]
    before = {path.read_bytes() for path in tmp_path.glob("set/shards/*/*.bin")}
    shards = plan.shards()
    short = next(part.name for part in shards[2] if part.name.endswith(".txt"))
    kept = 6
    if change.startswith("mended"):
        line = plan.parts()[-1].stop - len(json.dumps({"text": lines[-1]})) - 1
        lines[-1] = "mended".ljust(len(lines[-1]) - 1, "!")
        rows(corpus, "long.jsonl", lines)
        others = {part for part in plan.parts()[60:] if part.start <= line < part.stop} | {plan.parts()[-1]}
        kept = sum(others.isdisjoint(shard) for shard in shards[:6])
    elif change == "removed":
        Path(short).unlink()
        kept = 5
    elif change == "appended":
        rows(corpus, "long.jsonl", [*lines, *lines])
        kept = sum(plan.parts()[-1] not in shard for shard in shards[:6])
    elif change == "added":
        (corpus / "new.txt").write_text("new")
    else:
        os.utime(short, ns=(1, 1))  # with the same content
    if change == "mended twice":
        made_of(plan_of(), tmp_path / "set", stop=1)
        lines[-1] = "mended again"
        rows(corpus, "long.jsonl", lines)
    now = plan_of()
    made = made_of(now, tmp_path / "set", stop=2)
    if change != "mended twice":
        assert made == [f"{kept:05}", f"{kept + 1:05}"]
    prepare(now, tmp_path / "set", num_workers=0).verify()  # takes up the changed plan after a stop
    assert len(before & {path.read_bytes() for path in tmp_path.glob("set/shards/*/*.bin")}) >= kept > 3
    whole = texts(prepare(now, tmp_path / "whole", num_workers=0))
    assert texts(TokenStore(tmp_path / "set")) == whole
    assert any(text.startswith("mended!") for text in whole) == (change == "mended")


def test_a_shard_of_other_parts_is_made_again(
    plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path, made_of: Callable[..., list[str]]
) -> None:
    made_of(plan_of(), tmp_path / "set", stop=3)
    shards = tmp_path / "set" / "shards"
    (shards / "00001").rename(shards / "00004")
    made = made_of(plan_of(), tmp_path / "set")
    assert "00001" in made
    assert "00004" in made
    assert texts(TokenStore(tmp_path / "set")) == sorted(path.read_text() for path in corpus.iterdir())


def test_an_unfinished_set_of_which_nothing_fits_is_refused(
    plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path, made_of: Callable[..., list[str]]
) -> None:
    made_of(plan_of(), tmp_path / "set", stop=3)
    whole = files(tmp_path / "set")
    corpus.rename(tmp_path / "elsewhere")
    (corpus).mkdir()
    (corpus / "other.txt").write_text("other")
    with pytest.raises(ValueError, match=r"60 files are gone, such as .*/00.txt; 1 files are new.* choose another"):
        prepare(plan_of(), tmp_path / "set", num_workers=0)
    assert files(tmp_path / "set") == whole


def test_a_tokenizer_is_trained_on_a_bounded_sample_of_the_training_texts(
    plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = train_tokenizer
    monkeypatch.setattr(module, "train_tokenizer", lambda texts, size: train(trained.extend(texts) or texts, size))
    prepare(plan_of(tokenizer=TRAINED), tmp_path / "all", num_workers=0)
    expected = [path.read_text() for path in corpus.iterdir()]
    assert sorted(trained) == sorted(text for text in expected if split_of(text, 0.2, 0.1) == "train")
    trained.clear()
    monkeypatch.setattr(module, "TRAINING_TEXT", 2000)
    prepare(plan_of(tokenizer=TRAINED), tmp_path / "some", num_workers=0)
    assert 0 < sum(map(len, trained)) < 2000 + max(map(len, expected))


def test_binary_files_can_be_skipped_and_are_counted(
    plan_of: Callable[..., Plan], corpus: Path, tmp_path: Path
) -> None:
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    store = prepare(plan_of(skip_binary=True, tokenizer=TRAINED), tmp_path / "set", num_workers=0)
    assert (store.manifest.num_documents, store.manifest.empty_documents) == (60, 1)


def test_a_full_disk_is_named_and_leaves_nothing_broken(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, full = _ShardWriter.flush, {"00002"}

    def no_space(self: Any) -> None:
        if self.path.name.partition(".")[0] in full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(self)

    monkeypatch.setattr("nsa_lightning.data.shards._ShardWriter.flush", no_space)
    message = r"shards/00002 cannot be written: No space left on device; 2 of \d+ shards are whole and kept"
    with pytest.raises(ValueError, match=message):
        prepare(plan_of(), tmp_path / "set", num_workers=0)
    assert sorted(path.name for path in (tmp_path / "set" / "shards").iterdir()) == ["00000", "00001"]
    full.clear()
    prepare(plan_of(), tmp_path / "set", num_workers=0).verify()


def test_a_worker_that_is_killed_is_told(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SMALL", 0)
    monkeypatch.setattr(workers, "_make_shard", die)
    with pytest.raises(ValueError, match="a worker process was killed; if memory is short, lower num_workers"):
        prepare(plan_of(), tmp_path / "set", num_workers=2)


def die(number: int, parts: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_mistake_of_ours_in_a_worker_keeps_its_traceback(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SMALL", 0)
    monkeypatch.setattr(workers, "_make_shard", stumble)
    with pytest.raises(ZeroDivisionError) as failed:
        prepare(plan_of(), tmp_path / "set", num_workers=2)
    assert "in stumble" in str(failed.value.__cause__)


def stumble(number: int, parts: Any) -> float:
    return number / 0


WORDS = ["def", "return", "import", "self", "été", "文字", "🙂", "0x7f"]
COMMAND = [sys.executable, "-m", "nsa_cli.main", "prepare"]
TELLING = """
import sys, tqdm
from nsa_cli.main import main

class TellingBar(tqdm.tqdm):
    def update(self, n=1):
        print("more is done", flush=True)
        return super().update(n)

tqdm.tqdm = TellingBar
sys.exit(main())
"""
"""The command, which tells of all progress on stdout."""


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_run_ends_its_workers_and_the_next_one_gives_the_same_set(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(rng.choices(WORDS, k=9000))}, ensure_ascii=False) for _ in range(150))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer.save(tmp_path / "tokenizer.json")
    arguments = ["--sources", "a.jsonl", "--tokenizer.path", "tokenizer.json", "--shard_size", "200000"]
    command = [*COMMAND, *arguments, "--num_workers", "2", "--output_dir"]
    telling = [sys.executable, "-c", TELLING, *command[3:], "killed"]
    run = subprocess.Popen(telling, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout is not None
    assert any(len(list(tmp_path.glob("killed/shards/?????"))) >= 3 for _ in run.stdout)
    workers = [pid for pid in children(run.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    ends = [os.pidfd_open(pid) for pid in workers]
    run.kill()
    run.communicate()
    assert len(workers) == 2
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/shards/?????/*")}
    assert all(select([end], [], [], 60)[0] for end in ends)  # which each worker's end makes readable
    for end in ends:
        os.close(end)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    subprocess.run([*command, "killed"], cwd=tmp_path, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    subprocess.run([*COMMAND, *arguments, "--output_dir", "whole"], cwd=tmp_path, check=True, capture_output=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.slow
def test_of_two_processes_one_prepares_and_the_other_waits(corpus: Path, tmp_path: Path) -> None:
    command = [
        *COMMAND,
        "--sources",
        str(corpus),
        "--tokenizer.vocab_size",
        "300",
        "--output_dir",
        str(tmp_path / "set"),
    ]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]


def test_urls_are_prepared_like_files(corpus: Path, plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(corpus), "/corpus", recursive=True)
    try:
        config = TokenizerConfig(path=str(tmp_path / "given.json"))
        plan = make_plan(TextSettings(sources="memory://corpus", tokenizer=config, **FRACTIONS), shard_size=2000)
        local = prepare(plan_of(), tmp_path / "local", num_workers=0)
        assert prepare(plan, tmp_path / "remote", num_workers=0).fingerprint == local.fingerprint
    finally:
        memory.rm("/corpus", recursive=True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shard_size": 0}, "data.shard_size must be at least 1, got 0"),
        ({"seed": -1}, "data.seed must be at least 0, got -1"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "must be 0 or more, below 1 in sum, got (0.6, 0.4)"),
        ({"test_fraction": -0.1}, "must be 0 or more, below 1 in sum, got (0.2, -0.1)"),
    ],
)
def test_settings_out_of_range_are_named(plan_of: Callable[..., Plan], setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(**setting)
