import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_lightning.data import best_fit
from nsa_lightning.data.best_fit import BestFitPlan, write_plan
from nsa_lightning.data.dataset import PackedSplit
from nsa_lightning.data.token_store import TokenStore

SEQ_LEN = st.integers(2, 300)
LENGTHS = st.lists(st.integers(1, 8) | st.integers(1, 900), min_size=1, max_size=60)
FIXTURE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[[list[int], int], BestFitPlan]:
    def make(lengths: list[int], seq_len: int) -> BestFitPlan:
        offsets = np.cumsum([0, *lengths])
        write_plan(tmp_path / "plan", offsets, seq_len)
        return BestFitPlan(tmp_path / "plan", offsets, seq_len)

    return make


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_fit, "GROUP_SEQUENCES", 5)
    monkeypatch.setattr(best_fit, "CHUNK_GROUPS", 2)
    monkeypatch.setattr(best_fit, "CHUNK_DOCUMENTS", 20)


def sequences_of(plan: BestFitPlan) -> list[list[tuple[int, int, int]]]:
    columns = [plan.pieces(i) for i in range(plan.num_sequences)]
    return [[(int(d), int(a), int(b)) for d, a, b in zip(*pieces, strict=True)] for pieces in columns]


@FIXTURE
@given(lengths=LENGTHS, seq_len=SEQ_LEN)
def test_every_token_is_packed_once_and_only_longer_documents_are_cut(
    plan_of: Callable[..., BestFitPlan], small_groups: None, lengths: list[int], seq_len: int
) -> None:
    plan = plan_of(lengths, seq_len)
    sequences = sequences_of(plan)
    assert all(0 < sum(stop - start for _, start, stop in pieces) <= seq_len for pieces in sequences)
    pieces = sorted(piece for pieces in sequences for piece in pieces)
    place = dict.fromkeys(range(len(lengths)), 0)
    for document, start, stop in pieces:
        assert place[document] == start < stop
        assert stop == lengths[document] or stop - start == seq_len
        place[document] = stop
    assert list(place.values()) == lengths
    assert plan.cut_documents() == sum(length > seq_len for length in lengths)


@FIXTURE
@given(lengths=LENGTHS, seq_len=SEQ_LEN)
def test_the_look_ahead_is_bounded_and_chunks_change_nothing(
    plan_of: Callable[..., BestFitPlan], small_groups: None, lengths: list[int], seq_len: int
) -> None:
    packed = sequences_of(plan_of(lengths, seq_len))
    starts = np.cumsum([0, *lengths])
    for pieces in packed:
        groups = {int(starts[document]) // (5 * seq_len) for document, _, _ in pieces}
        assert len(groups) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit, "CHUNK_GROUPS", 1000)
        patch.setattr(best_fit, "CHUNK_DOCUMENTS", 1000)
        assert sequences_of(plan_of(lengths, seq_len)) == packed


def test_the_longest_goes_first_into_the_fullest_sequence_with_room(plan_of: Callable[..., BestFitPlan]) -> None:
    packed = sequences_of(plan_of([30, 70, 45, 28, 55, 260], 100))
    assert [[document for document, _, _ in pieces] for pieces in packed] == [[0, 1], [3, 5], [2, 4], [5], [5]]
    assert [packed[1], *packed[3:]] == [[(3, 0, 28), (5, 200, 260)], [(5, 0, 100)], [(5, 100, 200)]]


def test_little_is_padded_among_many_documents(plan_of: Callable[..., BestFitPlan]) -> None:
    rng = np.random.default_rng(0)
    for mean, seq_len in (1500, 8192), (20, 8192), (1500, 65536), (100_000, 8192):
        lengths = np.maximum(1, rng.lognormal(np.log(mean), 1.2, 2**26 // mean // 2).astype(int))
        plan = plan_of(lengths.tolist(), seq_len)
        padding = 1 - lengths.sum() / (plan.num_sequences * seq_len)
        assert 0 < padding < 0.012, (mean, seq_len)


@pytest.fixture
def store(make_store: Callable[..., TokenStore]) -> TokenStore:
    return make_store([5, 9, 2, 14, 7])


def test_a_plan_is_made_once_and_opened_anew_by_another_process(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PackedSplit(store, "train", 8, "best_fit", tmp_path / "cache")
    monkeypatch.setattr("nsa_lightning.data.dataset.write_plan", None)
    pickled = pickle.dumps(first)
    assert len(pickled) < 1000
    second = pickle.loads(pickled)
    assert sequences_of(second.plan) == sequences_of(first.plan)
    assert first.num_padding == second.num_padding == 8 * first.plan.num_sequences - 37


@pytest.mark.parametrize("name", ["bounds.bin", "documents.bin", "long.bin"])
def test_a_damaged_plan_is_named(store: TokenStore, tmp_path: Path, name: str) -> None:
    PackedSplit(store, "train", 8, "best_fit", tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob(name)
    for content in path.read_bytes()[:-8], b"":
        path.write_bytes(content)
        message = f"the plan {re.escape(str(path.parent))} cannot be read: .*; delete it and run again"
        with pytest.raises(ValueError, match=message):
            PackedSplit(store, "train", 8, "best_fit", tmp_path / "cache")


def test_a_plan_that_cannot_be_written_leaves_nothing_behind(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(best_fit, "pack_best_fit", full)
    with pytest.raises(ValueError, match=r"plan-.* cannot be written: No space left on device"):
        PackedSplit(store, "train", 8, "best_fit", tmp_path / "cache")
    assert list((tmp_path / "cache").glob("plan-*")) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("name", ["bounds.bin", "documents.bin", "long.bin"])
def test_a_plan_whose_last_bytes_do_not_fit_is_not_taken_for_whole(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", **more: opened(Path("/dev/full") if path.name == name else path, mode, **more),
    )
    with pytest.raises(ValueError, match=r"plan-.* cannot be written: No space left on device"):
        PackedSplit(store, "train", 8, "best_fit", tmp_path / "cache")
    assert list((tmp_path / "cache").glob("plan-*")) == []


PLANNER = """
import sys
from pathlib import Path
from nsa_lightning.data import best_fit
from nsa_lightning.data.dataset import PackedSplit
from nsa_lightning.data.token_store import TokenStore

def told(offsets, seq_len, pack=best_fit.pack_best_fit):
    print("planning", flush=True)
    sys.stdin.readline()
    yield from pack(offsets, seq_len)

best_fit.pack_best_fit = told
print("opening", flush=True)
print(PackedSplit(TokenStore(sys.argv[1]), "train", 8, "best_fit", Path(sys.argv[2])).plan.num_sequences)
"""


@pytest.mark.slow
def test_of_two_processes_one_plans_and_a_killed_one_leaves_nothing(store: TokenStore, tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PLANNER, str(store.path), str(tmp_path / "cache")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "opening\n"
        return process

    killed = start()
    assert killed.stdout is not None
    assert killed.stdout.readline() == "planning\n"  # and waits to be told to
    both = [start(), start()]
    killed.kill()
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = sorted(process.communicate(timeout=60)[0] for process in both)
    killed.communicate()
    assert printed == ["5\n", "planning\n5\n"]
    assert [path.name.count(".") for path in (tmp_path / "cache").glob("plan-*")] == [0]
