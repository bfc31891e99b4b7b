"""Packing: best-fit with nothing lost, the seeded packs of an epoch, what every rank runs in every step."""

import math
from itertools import combinations, islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import Fixed, StepPlan, best_fit, epoch_order

CAPACITY = 20


@st.composite
def packing_tasks(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths up to the capacity itself, and some of their indices in any order."""
    lengths = draw(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40))
    order = draw(st.permutations(range(len(lengths))))
    return lengths, order[: draw(st.integers(0, len(lengths)))]


@st.composite
def plans(draw: st.DrawFn, /, **given_fields: Any) -> StepPlan:
    """A plan for one to three ranks, with packs or without; any field can be given."""
    drawn: dict[str, Any] = {
        "samples": Fixed(tuple(draw(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40)))),
        "seed": draw(st.integers(0, 2**40)),
        "micro_batch": draw(st.integers(1, 5)),
        "accumulation": draw(st.integers(1, 4)),
        "ranks": draw(st.integers(1, 3)),
        "capacity": draw(st.sampled_from([None, CAPACITY, 2 * CAPACITY])),
    }
    return StepPlan(**(drawn | given_fields))


def samples_of(step: list[list[list[int]]]) -> list[int]:
    """All samples of a step, micro-batch by micro-batch and rank by rank."""
    return [index for micro_batch in step for indices in micro_batch for index in indices]


def test_the_order_follows_seed_and_epoch_and_nothing_else() -> None:
    """Same seed and epoch: same order, wherever torch's and numpy's own streams stand; else another order."""
    order = epoch_order(50, seed=17, epoch=0)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the old global stream is the one meant
    assert epoch_order(50, seed=17, epoch=0) == order
    assert epoch_order(50, seed=17, epoch=1) != order != epoch_order(50, seed=18, epoch=0)
    assert epoch_order(50, seed=1, epoch=2) != epoch_order(50, seed=2, epoch=1)
    assert epoch_order(50, seed=17, epoch=0, purpose="pack-order") != order


def test_the_order_is_the_same_on_every_machine() -> None:
    """A run of yesterday is continued today: the order of seed 17 is written down."""
    assert epoch_order(8, seed=17, epoch=0) == [6, 4, 0, 5, 1, 3, 2, 7]


@given(packing_tasks(), st.integers(1, 12))
def test_best_fit_puts_every_index_of_the_order_in_one_pack(task: tuple[list[int], list[int]], window: int) -> None:
    """Nothing lost, nothing doubled, nothing empty, whatever the windows; in a pack the order stays."""
    lengths, order = task
    packs = best_fit(lengths, order, CAPACITY, window=window)
    assert sorted(index for pack in packs for index in pack) == sorted(order)
    assert all(packs)
    place = {index: n for n, index in enumerate(order)}
    assert all(place[a] < place[b] for pack in packs for a, b in pairwise(pack))


@given(packing_tasks(), st.integers(1, 12))
def test_no_pack_is_over_the_capacity(task: tuple[list[int], list[int]], window: int) -> None:
    """The samples of a pack have at most as many tokens as it holds."""
    lengths, order = task
    packs = best_fit(lengths, order, CAPACITY, window=window)
    assert max((sum(lengths[index] for index in pack) for pack in packs), default=0) <= CAPACITY


@given(packing_tasks(), st.integers(1, 12))
def test_best_fit_is_deterministic(task: tuple[list[int], list[int]], window: int) -> None:
    """The same lengths and order give the same packs in the same order; the arguments stay as they were."""
    lengths, order = list(task[0]), list(task[1])
    first = best_fit(lengths, order, CAPACITY, window=window)
    assert best_fit(tuple(task[0]), tuple(task[1]), CAPACITY, window=window) == first
    assert (lengths, order) == task


@given(packing_tasks())
def test_no_two_packs_of_a_window_could_have_been_one(task: tuple[list[int], list[int]]) -> None:
    """A pack is begun only where no other has room."""
    lengths, order = task
    loads = [sum(lengths[index] for index in pack) for pack in best_fit(lengths, order, CAPACITY)]
    assert all(a + b > CAPACITY for a, b in combinations(loads, 2))


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        # 7 begins A (room 3), 5 begins B (room 5), 5 fills B, 3 fills A, 2 begins C
        ([7, 5, 5, 3, 2], [{0, 3}, {1, 2}, {4}]),
        # 4 begins A (room 6), 7 begins B (room 3); 3 goes into B, the fuller one, though A came first; 6 fills A
        ([4, 7, 3, 6], [{1, 2}, {0, 3}]),
        # 3 begins A (room 7), 8 begins B (room 2); 4 does not fit into B, so A (room 3); 2 goes into B, 3 into A
        ([3, 8, 4, 2, 3], [{0, 2, 4}, {1, 3}]),
    ],
)
def test_each_sample_goes_into_the_fullest_pack_that_has_room(lengths: list[int], packs: list[set[int]]) -> None:
    """Worked out by hand for packs of 10 tokens."""
    found = best_fit(lengths, range(len(lengths)), 10)
    assert sorted(map(sorted, found)) == sorted(map(sorted, packs))


def test_the_order_decides_who_shares_a_pack() -> None:
    """Samples are taken as the order has them, not the longest first: 5 and 4 meet before 6 comes."""
    assert sorted(best_fit([6, 5, 4], [1, 2, 0], 10)) == [[0], [1, 2]]
    assert sorted(best_fit([6, 5, 4], [0, 1, 2], 10)) == [[0, 2], [1]]


def test_a_sample_as_long_as_the_capacity_has_a_pack_of_its_own() -> None:
    """It fits exactly, and nothing fits beside it."""
    assert sorted(best_fit([10, 1, 10, 9, 10], range(5), 10)) == [[0], [1, 3], [2], [4]]


def test_the_emptiest_pack_of_a_window_is_carried_into_the_next() -> None:
    """6 and 8 are a window: 6 is taken up again and gets the 4; 8 is closed, so that the 2 begins another."""
    lengths = [6, 8, 4, 2]
    assert sorted(best_fit(lengths, range(4), 10, window=2)) == [[0, 2], [1], [3]]
    assert sorted(best_fit(lengths, range(4), 10)) == [[0, 2], [1, 3]]
    # one sample a window: the pack goes on as long as there is nothing emptier
    assert sorted(best_fit([2, 2, 2, 2, 2], range(5), 10, window=1)) == [[0, 1, 2, 3, 4]]


@given(plans())
def test_the_packs_of_an_epoch_hold_every_sample_once(plan: StepPlan) -> None:
    """In each epoch, and none is over the capacity."""
    for epoch in range(3):
        packs = plan.packs(epoch)
        assert sorted(index for pack in packs for index in pack) == list(range(plan.samples.count(0)))
        if plan.capacity is not None:
            assert max(sum(plan.samples.lengths(0)[index] for index in pack) for pack in packs) <= plan.capacity


def test_packs_follow_seed_and_epoch_and_nothing_else() -> None:
    """Same seed and epoch: same packs, also for another split of the steps; else others, in another order."""
    lengths = tuple(1 + 7 * n % CAPACITY for n in range(50))

    def packs(seed: int, epoch: int, **split: int) -> tuple[list[int], ...]:
        fields = {"micro_batch": 2, "accumulation": 2} | split
        return StepPlan(Fixed(lengths), seed, capacity=2 * CAPACITY, **fields).packs(epoch)

    first = packs(17, 0)
    torch.manual_seed(3)
    assert packs(17, 0, micro_batch=1, accumulation=3, ranks=2) == first
    others = [first, packs(17, 1), packs(17, 2), packs(18, 0), packs(18, 1)]
    for a, b in combinations(others, 2):
        assert sorted(map(sorted, a)) != sorted(map(sorted, b))


def test_the_packs_are_the_same_on_every_machine() -> None:
    """A run of yesterday is continued today: the packs of seed 17 and their order are written down."""
    plan = StepPlan(Fixed((7, 5, 5, 3, 2, 9, 4, 6)), seed=17, micro_batch=1, accumulation=1, capacity=10)
    # taken in the order [6, 4, 0, 5, 1, 3, 2, 7]: 4+2, then 7, 9, 5, 3 beside the 7, 5 beside the 5, 6 alone
    assert sorted(plan.packs(0)) == [[0, 3], [1, 2], [5], [6, 4], [7]]
    assert plan.packs(0) == ([1, 2], [5], [7], [6, 4], [0, 3])


def test_packs_come_in_random_order_not_by_fullness() -> None:
    """Best-fit leaves the emptiest for the end; training does not see them there epoch after epoch."""
    plan = StepPlan(Fixed(tuple([6] * 20 + [4] * 10)), seed=17, micro_batch=1, accumulation=1, capacity=10)
    full = [[len(pack) == 2 for pack in plan.packs(epoch)] for epoch in range(3)]
    assert all(flags != sorted(flags, reverse=True) for flags in full)
    assert full[0] != full[1] != full[2]


@given(plans(capacity=None))
def test_without_a_capacity_every_sample_is_a_pack_in_the_order_of_the_epoch(plan: StepPlan) -> None:
    """Not packed: the order is `epoch_order`, whatever the lengths."""
    for epoch in range(2):
        order = epoch_order(plan.samples.count(0), seed=plan.seed, epoch=epoch)
        assert plan.packs(epoch) == tuple([index] for index in order)


@given(plans(), st.integers(0, 60))
def test_no_sample_is_lost_or_doubled_and_any_step_can_be_entered(plan: StepPlan, skip: int) -> None:
    """Each epoch is a permutation over ranks and micro-batches; entering at k is leaving k out, also far inside."""
    per_epoch = [plan.steps_in_epoch(epoch) for epoch in range(3)]
    steps = list(islice(plan.steps(), skip + sum(per_epoch)))
    begin = 0
    for count in per_epoch:
        of_epoch = steps[begin : begin + count]
        assert sorted(index for step in of_epoch for index in samples_of(step)) == list(range(plan.samples.count(0)))
        begin += count
    assert list(islice(plan.steps(skip), sum(per_epoch))) == steps[skip:]
    assert list(islice(plan.steps(first_step=skip), 1)) == list(islice(plan.steps(), skip, skip + 1))


@given(plans())
def test_an_epoch_goes_evenly_over_as_few_steps_as_hold_it(plan: StepPlan) -> None:
    """No step is over the batch, and none is more than a pack smaller: AdamW would move the weights as far on few."""
    packs = plan.packs(0)
    number = {index: n for n, pack in enumerate(packs) for index in pack}
    batch = plan.micro_batch * plan.accumulation * plan.ranks
    count = plan.steps_in_epoch(0)
    assert count == math.ceil(len(packs) / batch)
    sizes = [len({number[index] for index in samples_of(step)}) for step in islice(plan.steps(), count)]
    assert sum(sizes) == len(packs)
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1


def test_nine_packs_are_three_steps_of_three() -> None:
    """Worked out by hand for steps of four: not 4, 4 and 1; ten are 4, 3 and 3."""
    fields: dict[str, Any] = {"seed": 17, "micro_batch": 1, "accumulation": 4}
    assert [len(step) for step in islice(StepPlan(Fixed((1,) * 9), **fields).steps(), 4)] == [3, 3, 3, 3]
    assert [len(step) for step in islice(StepPlan(Fixed((1,) * 10), **fields).steps(), 4)] == [4, 3, 3, 4]


@given(plans())
def test_ranks_share_whole_packs_evenly_in_the_order_of_the_epoch(plan: StepPlan) -> None:
    """A rank has at most `micro_batch` packs at once and at most one more than another; a step's last may be short."""
    packs = plan.packs(0)
    number = {index: n for n, pack in enumerate(packs) for index in pack}
    steps = list(islice(plan.steps(), plan.steps_in_epoch(0)))
    assert [index for step in steps for index in samples_of(step)] == [index for pack in packs for index in pack]
    assert all(len(step) <= plan.accumulation for step in steps)
    for step in steps:
        counts = [[len({number[index] for index in indices}) for indices in micro_batch] for micro_batch in step]
        assert sum(map(sum, counts)) == len({number[index] for index in samples_of(step)})  # no pack is on two ranks
        assert all(len(of_ranks) == plan.ranks for of_ranks in counts)
        assert all(of_ranks == [plan.micro_batch] * plan.ranks for of_ranks in counts[:-1])
        assert max(counts[-1]) - min(counts[-1]) <= 1
        assert 1 <= max(counts[-1]) <= plan.micro_batch


def test_a_rank_without_a_pack_gets_an_empty_list() -> None:
    """4 samples on 3 ranks: two steps of two, and the third rank has nothing; likewise for packs."""
    a, b, c, d = epoch_order(4, seed=17, epoch=0)
    plan = StepPlan(Fixed((5, 5, 5, 5)), seed=17, micro_batch=1, accumulation=1, ranks=3)
    assert list(islice(plan.steps(), 2)) == [[[[a], [b], []]], [[[c], [d], []]]]
    packed = StepPlan(Fixed((5, 5, 5, 5)), seed=17, micro_batch=2, accumulation=2, ranks=3, capacity=10)
    assert packed.steps_in_epoch(0) == 1
    (micro_batch,) = next(packed.steps())
    assert [len(indices) for indices in micro_batch] == [2, 2, 0]


@given(plans())
def test_ranks_or_accumulation_make_the_same_steps(plan: StepPlan) -> None:
    """So many ranks take so many times fewer micro-batches: one rank that accumulates more sees the same samples."""
    fields = vars(plan) | {"ranks": 1, "accumulation": plan.ranks * plan.accumulation}
    alone = StepPlan(**fields)
    count = plan.steps_in_epoch(0) + plan.steps_in_epoch(1)
    assert alone.steps_in_epoch(0) + alone.steps_in_epoch(1) == count
    for shared_step, step in zip(islice(plan.steps(), count), islice(alone.steps(), count), strict=True):
        assert sorted(samples_of(shared_step)) == sorted(samples_of(step))


def test_two_ranks_are_two_micro_batches_of_one() -> None:
    """7 samples, worked out by hand: the same steps, side by side or one after the other."""
    a, b, c, d, e, f, g = epoch_order(7, seed=5, epoch=0)
    fields: dict[str, Any] = {"samples": Fixed((1,) * 7), "seed": 5, "micro_batch": 2}
    two = StepPlan(**fields, accumulation=1, ranks=2)
    one = StepPlan(**fields, accumulation=2, ranks=1)
    assert list(islice(two.steps(), 2)) == [[[[a, b], [c, d]]], [[[e, f], [g]]]]
    assert list(islice(one.steps(), 2)) == [[[[a, b]], [[c, d]]], [[[e, f]], [[g]]]]


@pytest.mark.parametrize(
    ("epochs", "ends"),
    [(1, [3]), (2, [3, 6]), (3.0, [3, 6, 9]), (0.5, [2]), (1 / 3, [1]), (0.25, [1]), (2.5, [3, 6, 8]), (1.9, [3, 6])],
)
def test_an_epoch_ends_with_its_last_step_and_a_fraction_inside(epochs: float, ends: list[int]) -> None:
    """10 samples in steps of 2 x 2 are 3 steps an epoch: half of it ends, rounded up, with the second."""
    plan = StepPlan(Fixed((1,) * 10), seed=17, micro_batch=2, accumulation=2)
    assert plan.last_steps(epochs) == ends


@pytest.mark.parametrize(("epochs", "ends"), [(0.07, [7]), (1.07, [100, 107]), (0.071, [8]), (0.29, [29])])
def test_a_fraction_is_not_rounded_up_for_the_last_bit_of_a_float(epochs: float, ends: list[int]) -> None:
    """0.07 of 100 steps are 7, though the float product is a little more."""
    assert StepPlan(Fixed((1,) * 100), seed=17, micro_batch=1, accumulation=1).last_steps(epochs) == ends


def test_each_epoch_ends_after_as_many_steps_as_it_has_packs() -> None:
    """Best-fit finds 2, 3 and 3 packs in the orders of seed 2; a fraction is one of the epoch it ends in."""
    assert [epoch_order(4, seed=2, epoch=epoch) for epoch in range(3)] == [[3, 2, 0, 1], [1, 3, 0, 2], [1, 2, 3, 0]]
    # tokens as they come: 5 5 6 4 in two packs of 10; 4 5 6 5 and 4 5 5 6 in three, since the 4 is spent on a 5
    plan = StepPlan(Fixed((6, 4, 5, 5)), seed=2, micro_batch=1, accumulation=1, capacity=10)
    assert [plan.steps_in_epoch(epoch) for epoch in range(3)] == [2, 3, 3]
    assert plan.last_steps(3) == [2, 5, 8]
    assert plan.last_steps(0.5) == [1]
    assert plan.last_steps(1.5) == [2, 4]
    assert plan.last_steps(2.5) == [2, 5, 7]


def test_where_samples_change_every_epoch_counts_as_the_first() -> None:
    """No epoch but the first is measured to know the steps of a run; each still ends with its own last pack."""

    class Growing:
        """Two samples more in each epoch; what is asked for is kept."""

        is_constant = False

        def __init__(self) -> None:
            self.asked: set[int] = set()

        def count(self, epoch: int) -> int:
            return 4 + 2 * epoch

        def lengths(self, epoch: int) -> tuple[int, ...]:
            self.asked.add(epoch)
            return (5,) * self.count(epoch)

    samples = Growing()
    plan = StepPlan(samples, seed=17, micro_batch=1, accumulation=1, capacity=10)
    assert plan.last_steps(3.5) == [2, 4, 6, 7]
    assert samples.asked == {0}
    assert list(islice(plan.epochs(), 10)) == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("capacity", [None, 10])
def test_an_epoch_without_a_sample_is_passed_over(capacity: int | None) -> None:
    """Small weights may draw none; a run that goes on after any step takes the same ones, of the same epochs."""

    class Sparse:
        """Two samples in every third epoch."""

        is_constant = False

        def count(self, epoch: int) -> int:
            return 0 if epoch % 3 else 2

        def lengths(self, epoch: int) -> tuple[int, ...]:
            return (6,) * self.count(epoch)

    plan = StepPlan(Sparse(), seed=17, micro_batch=1, accumulation=1, capacity=capacity)
    steps, epochs = list(islice(plan.steps(), 6)), list(islice(plan.epochs(), 6))
    assert epochs == [0, 0, 3, 3, 6, 6]
    assert [sorted(samples_of(a) + samples_of(b)) for a, b in zip(steps[::2], steps[1::2], strict=True)] == [[0, 1]] * 3
    for first in range(5):
        assert next(plan.steps(first)) == steps[first]
        assert next(plan.epochs(first)) == epochs[first]


@given(plans(), st.integers(1, 4))
def test_the_last_step_of_an_epoch_has_seen_every_sample_as_often_as_epochs(plan: StepPlan, epochs: int) -> None:
    """Also where the epochs have different numbers of packs, and so of steps."""
    ends = plan.last_steps(epochs)
    seen = list(np.cumsum([len(samples_of(step)) for step in islice(plan.steps(), ends[-1])]))
    assert [seen[end - 1] for end in ends] == [n * plan.samples.count(0) for n in range(1, epochs + 1)]
