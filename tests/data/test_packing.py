import numpy as np
import pytest

from trainjax.data import best_fit, unpacked

RNG = np.random.default_rng(0)
LENGTHS = [RNG.integers(1, 513, 400).tolist(), [512] * 5, [1] * 700, [300, 212, 213, 299, 512]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "full", "ones", "pairs"])
def test_best_fit_puts_every_example_in_one_row_that_holds_it(lengths):
    bins = best_fit(lengths, 512)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert max(sum(lengths[item] for item in members) for members in bins) <= 512


@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "full", "ones", "pairs"])
def test_best_fit_keeps_johnsons_bound(lengths):
    fewest = -(-sum(lengths) // 512)  # no packing needs less
    assert len(best_fit(lengths, 512)) <= 11 / 9 * fewest + 1


def test_short_examples_open_no_row_while_another_is_less_than_three_quarters_full():
    lengths = RNG.integers(1, 129, 900).tolist()
    filled = sorted(sum(lengths[item] for item in members) for members in best_fit(lengths, 512))
    assert filled[1] > 0.75 * 512


def test_short_examples_keep_their_order_so_that_rows_mix_them():
    lengths = [40, 60] * 50
    kinds = [{lengths[item] for item in members} for members in best_fit(lengths, 512)]
    assert all(len(kind) == 2 for kind in kinds)


def test_best_fit_fills_rows_of_instruction_like_lengths():
    lengths = np.clip(RNG.lognormal(5, 0.6, 3000), 20, 1024).astype(int).tolist()
    assert sum(lengths) / (1024 * len(best_fit(lengths, 1024))) > 0.99


def test_unpacked_is_one_example_a_row():
    assert unpacked([5, 3], 8) == [[0], [1]]
