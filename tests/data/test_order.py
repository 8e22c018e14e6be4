from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_lightning.data.order import SLOTS, InTurn, Permutation, Place, Shuffled, interleave

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
WEIGHTS = st.floats(0.3, 5.0)
PATIENT = settings(deadline=None)


@PATIENT
@given(st.integers(1, 2000), st.text(max_size=5))
def test_a_permutation_takes_every_element_to_another_place(size: int, key: str) -> None:
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


@given(st.integers(2**20, 2**62), st.data())
def test_a_permutation_of_any_size_stays_in_its_range(size: int, data: st.DataObject) -> None:
    permutation = Permutation(size, "key")
    chosen = data.draw(st.sets(st.integers(0, size - 1), min_size=20, max_size=20))
    places = {permutation(index) for index in chosen}
    assert len(places) == 20
    assert max(places) < size


@pytest.mark.parametrize("size", [3, 7, 20, 40])
def test_every_element_comes_to_every_place_about_equally_often(size: int) -> None:
    keys = 200 * size
    counts = np.zeros((size, size))
    for key in range(keys):
        permutation = Permutation(size, str(key))
        counts[np.arange(size), [permutation(index) for index in range(size)]] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum() / (size - 1) ** 2
    assert chi_square == pytest.approx(1, abs=6 * np.sqrt(2) / (size - 1))


def test_neighbours_do_not_stay_together() -> None:
    permutation = Permutation(10_000, "0")
    steps = np.diff([permutation(index) for index in range(10_000)])
    assert Counter(steps.tolist()).most_common(1)[0][1] < 10


def test_no_release_changes_the_order() -> None:
    assert [Permutation(10, "7")(index) for index in range(10)] == [6, 3, 9, 5, 0, 1, 8, 2, 4, 7]
    order = Shuffled([5, 3], {"code": 2.0, "text": 1.0}, seed=7)
    assert [order.place(2, index) for index in range(6)] == [(1, 0), (0, 3), (0, 1), (1, 0), (0, 4), (0, 2)]


def of_sets(places: list[Place], num_sets: int) -> list[list[int]]:
    return [[place.sequence for place in places if place.set_index == index] for index in range(num_sets)]


@PATIENT
@given(st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=4), st.integers(0, 2**63), st.data())
def test_every_pass_over_a_set_of_a_mixture_has_each_sequence_once(
    sets: list[tuple[int, float]], seed: int, data: st.DataObject
) -> None:
    sizes = [size for size, _ in sets]
    order = Shuffled(sizes, {str(i): weight for i, (_, weight) in enumerate(sets)}, seed)
    epochs = 1 if order.num_sequences > 1000 else data.draw(st.integers(1, 3))
    stream = [order.place(epoch, g) for epoch in range(epochs) for g in range(order.num_sequences)]
    for size, sequences in zip(sizes, of_sets(stream, len(sizes)), strict=True):
        passes = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        assert len(sequences) >= size
        assert all(sorted(each) == list(range(size)) for each in passes[: len(sequences) // size])
        assert all(len(set(each)) == len(each) for each in passes)
    before = of_sets([order.place(0, g) for g in range(order.num_sequences - 1)], len(sizes))
    assert any(
        len(set(seen)) < size for seen, size in zip(before, sizes, strict=True)
    )  # no epoch is longer than it must


@given(st.lists(WEIGHTS, min_size=2, max_size=5))
def test_any_stretch_of_a_mixture_has_the_shares_of_its_weights(weights: list[float]) -> None:
    table = interleave(dict(zip("abcde", weights, strict=False)))
    shares = np.array(weights) / sum(weights)
    assert len(table) == SLOTS
    for index, share in enumerate(shares):
        seen = np.append(0, np.cumsum(table == index))
        assert np.abs(seen - np.arange(SLOTS + 1) * share).max() <= len(weights)


def test_a_set_that_is_one_of_several_is_shuffled_unlike_the_others() -> None:
    order = Shuffled([50, 50], {"a": 1.0, "b": 1.0}, seed=0)
    first, second = of_sets([order.place(0, g) for g in range(100)], 2)
    assert sorted(first) == sorted(second)
    assert first != second


def test_each_seed_and_epoch_has_its_order() -> None:
    orders = [
        tuple(Shuffled([50], {"": 1.0}, seed).place(epoch, g).sequence for g in range(50))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_a_weight_too_small_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.mixture.rare.weight must be at least 1/10000 of all .*, got 1e-09 of"):
        Shuffled([5, 5], {"rare": 1e-9, "common": 1.0}, seed=0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(0, 3))
def test_sets_in_turn_come_one_after_the_other(sizes: list[int], epoch: int) -> None:
    order = InTurn(sizes)
    expected = [Place(index, sequence) for index, size in enumerate(sizes) for sequence in range(size)]
    assert [order.place(epoch, g) for g in range(order.num_sequences)] == expected
