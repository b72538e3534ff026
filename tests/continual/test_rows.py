"""Which rows a stage learns from: its own, some of earlier tasks again, all at once."""

import numpy as np

from trainjax.continual import joint, replay, sequential

SIZES = [40, 60, 20]
OWN = [np.arange(0, 40), np.arange(40, 100), np.arange(100, 120)]


def test_in_sequence_every_task_has_its_own_rows():
    for stage, own in zip(sequential().stages(SIZES, 0), OWN, strict=True):
        np.testing.assert_array_equal(stage, own)


def test_joint_learning_is_one_stage_of_all_rows():
    (stage,) = joint().stages(SIZES, 0)
    np.testing.assert_array_equal(stage, np.arange(120))


def test_replay_adds_its_share_of_different_rows_of_earlier_tasks():
    stages = replay(strength=0.5, capacity=50).stages(SIZES, 0)
    assert [len(stage) for stage in stages] == [40, 60 + 30, 20 + 10]
    for stage, own in zip(stages, OWN, strict=True):
        np.testing.assert_array_equal(stage[: len(own)], own)
        again = stage[len(own) :]
        assert len(set(again)) == len(again)
        assert (again < own[0]).all()


def test_replay_never_repeats_more_rows_than_are_kept():
    stages = replay(strength=5.0, capacity=7).stages(SIZES, 0)
    assert [len(stage) for stage in stages] == [40, 60 + 7, 20 + 7]


def test_replayed_rows_are_of_all_earlier_tasks_alike():
    counts = np.zeros(2)
    for seed in range(40):
        again = replay(strength=1.0, capacity=20).stages(SIZES, seed)[2][20:]
        counts += [(again < 40).sum(), (again >= 40).sum()]
    np.testing.assert_allclose(counts / counts.sum(), [0.4, 0.6], atol=0.05)


def test_the_same_seed_replays_the_same_rows_and_another_one_others():
    first, again, other = (replay().stages(SIZES, seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
