"""Slots divided among ranks: the bits of the undivided step, 1/size of the memory, whole checkpoints."""

import numpy as np
import pytest
from every import CLASSES, SHAPES, make, shares, variables

from distopt import optimizers, schedules
from distopt.aggregators import AllReduce, Sharded
from distopt.aggregators.ownership import bucket_slices
from distopt.constraints import MaxNorm, UnitNorm
from distopt.elementwise import elementwise
from distopt.optimizers import (
    LAMB,
    LARS,
    SGD,
    Adam,
    AdamW,
    LossScaleOptimizer,
    Muon,
    Nadam,
    Optimizer,
    RMSprop,
    keras_new,
    tf1,
)
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

RANKS = [1, 2, 3, 4]
BUCKET = 5 * 4  # bytes: every five elements are cut among the ranks, so all have parts of all variables
every = pytest.mark.parametrize("name", CLASSES)


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def seen(optimizer, own):
    """Everything that a rank has after training: values and whole state, by name."""
    return {v.name: v.numpy() for v in own} | {f"state:{k}": v for k, v in optimizer.state().items()}


def real_shares(step, rank, ranks):
    """Gradients that round: the order of their sum shows in the bits. The last of three or more has none."""
    random = np.random.default_rng([step, rank])
    found = [random.standard_normal(shape).astype("f4") for shape in SHAPES]
    return [None] * len(found) if ranks > 2 and rank == ranks - 1 else found


def trained(communicator, build, aggregator, arena=True, steps=4, share=real_shares, start=variables):
    own = start()
    if arena:
        Arena(own)
    optimizer = build(gradient_aggregator=aggregator(communicator, "mean", BUCKET))
    for step in range(steps):
        gradients = share(step, communicator.rank, communicator.size)
        examples = 0 if all(g is None for g in gradients) else 3 + 2 * communicator.rank
        optimizer.apply_gradients(zip(gradients, own, strict=True), examples=examples)
    return optimizer, own


def both(ranks, build, **how):
    """What all ranks have, undivided and divided; compared bit by bit."""

    def rank(communicator, aggregator):
        return seen(*trained(communicator, build, aggregator, **how))

    wanted = world(ranks, lambda communicator: rank(communicator, AllReduce))
    for found in world(ranks, lambda communicator: rank(communicator, Sharded)):
        equal(found, wanted[0])
    return wanted[0]


@every
@pytest.mark.parametrize("arena", [True, False])
def test_every_optimizer_takes_the_bits_of_the_undivided_step(name, arena):
    first = {v.name: v.numpy() for v in variables()}
    for ranks in RANKS:
        found = both(ranks, lambda **options: make(name, **options), arena=arena)
        assert any((found[v] != first[v]).any() for v in first)


@every
def test_the_state_is_that_of_one_process_where_no_sum_rounds(name):
    def rank(communicator, aggregator):
        own = variables()
        Arena(own)
        optimizer = make(name, gradient_aggregator=aggregator(communicator, "sum"))
        for step in range(3):
            part = shares(step, communicator.size, communicator.rank)
            optimizer.apply_gradients(zip(part, own, strict=True))
        return seen(optimizer, own)

    wanted = world(1, lambda communicator: rank(communicator, AllReduce))[0]
    for found in world(4, lambda communicator: rank(communicator, Sharded)):
        equal(found, wanted)


OPTIONS = {
    "amsgrad": lambda **o: Adam(0.1, amsgrad=True, **o),
    "centered": lambda **o: RMSprop(0.1, centered=True, momentum=0.9, **o),
    "schedule": lambda **o: Adam(schedules.ExponentialDecay(0.1, 2, 0.5), **o),
    "decay": lambda **o: SGD(0.1, momentum=0.9, decay=0.1, **o),
    "decays some": lambda **o: AdamW(0.1, weight_decay=0.1, exclude_from_weight_decay=["v1"], **o),
    "nadam": lambda **o: Nadam(0.1, **o),
    "clipnorm": lambda **o: Adam(0.1, clipnorm=0.5, **o),
    "global_clipnorm": lambda **o: Adam(0.1, global_clipnorm=0.5, **o),
    "clipvalue": lambda **o: Adam(0.1, clipvalue=0.1, **o),
    "transformer": lambda **o: Adam(
        0.1, gradient_transformers=[lambda pairs: [(g * (1 + g.max()), v) for g, v in pairs]], **o
    ),
    "averages": lambda **o: keras_new.Adam(0.1, use_ema=True, ema_overwrite_frequency=2, **o),
    "averages, decay": lambda **o: keras_new.SGD(0.1, 0.9, weight_decay=0.1, use_ema=True, **o),
    "lamb": lambda **o: LAMB(0.1, weight_decay=0.1, exclude_from_weight_decay=["v1"], **o),
    "lars": lambda **o: LARS(0.1, skip_list=["v1"], **o),
    "muon": lambda **o: Muon(0.1, weight_decay=0.1, exclude=["v2"], **o),
    "loss scale": lambda **o: LossScaleOptimizer(Adam(0.1, **o)),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ranks", RANKS)
def test_options_and_transforms_take_the_bits_of_the_undivided_step(name, ranks):
    both(ranks, OPTIONS[name])


@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_other_types_take_the_bits_of_the_undivided_step(dtype):
    def share(step, rank, ranks):
        found = real_shares(step, rank, ranks)
        return [None if g is None else g.astype(dtype) for g in found]

    both(3, lambda **o: Adam(0.1, **o), start=lambda: variables(dtype), share=share)


@pytest.mark.parametrize("ranks", RANKS)
def test_missing_gradients_leave_their_variables_and_slots_alone(ranks):
    # v0 has a gradient on rank 0 only, v1 on no rank in even steps, v2 on all.
    def share(step, rank, ranks):
        random = np.random.default_rng([step, rank])
        a, b, c = (random.standard_normal(shape).astype("f4") for shape in SHAPES)
        return [a if rank == 0 else None, None if step % 2 == 0 else b, c]

    both(ranks, lambda **o: Adam(0.1, **o), share=share)
    first = both(ranks, lambda **o: Adam(0.1, **o), share=share, steps=1)
    np.testing.assert_array_equal(first["v1"], variables()[1].numpy())


@pytest.mark.parametrize("constraint", [MaxNorm(0.5, axis=0), UnitNorm(axis=0), lambda w: w - w.mean()])
@pytest.mark.parametrize("unit", ["elements", "variables"])
def test_constraints_see_whole_variables_that_several_ranks_have_a_part_of(constraint, unit):
    def start():
        random = np.random.default_rng(1)
        w = Variable(random.standard_normal((25, 7)).astype("f4"), name="w", constraint=constraint)
        return [w, Variable(np.ones(3, "f4"), name="b")]

    def share(step, rank, ranks):
        random = np.random.default_rng([step, rank])
        return [random.standard_normal(v).astype("f4") for v in ((25, 7), (3,))]

    build = {"elements": Adam, "variables": LAMB}[unit]
    for ranks in RANKS:
        found = both(ranks, lambda **o: build(0.1, **o), start=start, share=share)
        if isinstance(constraint, UnitNorm):
            np.testing.assert_allclose(np.square(found["w"]).sum(axis=0), np.ones(7), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "LazyAdam", "Nadam", "Ftrl", "LARS", "LAMB", "Muon"]
)
@pytest.mark.parametrize("arena", [True, False])
def test_sparse_gradients_update_each_rank_s_part_of_the_rows(name, arena):
    # A table of 30 rows of 7: buckets and parts begin in the middle of rows. Rank 1 has no rows.
    def start():
        random = np.random.default_rng(1)
        return [
            Variable(random.standard_normal(s).astype("f4"), name=n) for n, s in (("t", (30, 7)), ("b", 5))
        ]

    def share(step, rank, ranks):
        random = np.random.default_rng([step, rank])
        rows = random.integers(0, 30, 0 if rank == 1 else 6)
        values = random.standard_normal((len(rows), 7)).astype("f4")
        return [IndexedSlices(values, rows, (30, 7)), random.standard_normal(5).astype("f4")]

    options = {"momentum": 0.9} if name == "SGD" else {}
    options |= {"weight_decay": 0.1, "decay_convention": "tfa"} if name == "AdamW" else {}
    for ranks in RANKS:
        build = lambda **o: CLASSES[name](learning_rate=0.1, **options, **o)  # noqa: E731
        both(ranks, build, arena=arena, start=start, share=share)


def test_some_ranks_give_rows_and_others_the_whole():
    def share(step, rank, ranks):
        random = np.random.default_rng([step, rank])
        whole = [random.standard_normal(shape).astype("f4") for shape in SHAPES]
        if rank == 1:
            whole[0] = IndexedSlices(whole[0][:2], np.array([2, 0]), SHAPES[0])
        return whole

    both(3, lambda **o: Adam(0.1, **o), share=share)


def test_a_variable_that_comes_twice_is_updated_twice():
    def rank(communicator, aggregator):
        own = variables()
        Arena(own)
        optimizer = Adam(0.1, gradient_aggregator=aggregator(communicator, "sum", BUCKET))
        pairs = [(np.full(v.shape, 1.0 + i, "f4"), v) for i in range(2) for v in own]
        optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        return seen(optimizer, own)

    wanted = world(2, lambda communicator: rank(communicator, AllReduce))[0]
    for found in world(2, lambda communicator: rank(communicator, Sharded)):
        equal(found, wanted)


def test_more_ranks_than_elements_leave_some_with_nothing():
    def start():
        return [Variable([3.0], name="w")]

    def share(step, rank, ranks):
        return [np.array([1.0 + rank], "f4")]

    for build in (Adam, LAMB):
        both(4, lambda build=build, **o: build(0.1, **o), start=start, share=share)
        both(4, lambda build=build, **o: build(0.1, **o), start=start, share=share, arena=False)


def test_an_empty_variable_is_no_trouble():
    def start():
        return [Variable(np.zeros((3, 0), "f4"), name="none"), Variable(np.ones(5, "f4"), name="w")]

    def share(step, rank, ranks):
        return [np.zeros((3, 0), "f4"), np.full(5, 1.0 + rank, "f4")]

    for build in (Adam, LAMB):
        for arena in (True, False):
            both(3, lambda build=build, **o: build(0.1, **o), start=start, share=share, arena=arena)


def test_slots_of_rules_by_element_take_a_share_of_the_memory():
    # 100 x 33 and 77 elements in lines of 64: 3328 + 128 elements, in buckets of 1024. Adam has two slots.
    def rank(communicator):
        own = [Variable(np.ones((100, 33), "f4"), name="w"), Variable(np.ones(77, "f4"), name="b")]
        Arena(own)
        optimizer = Adam(gradient_aggregator=Sharded(communicator, "sum", 1024 * 4))
        optimizer.apply_gradients([(np.ones(v.shape, "f4"), v) for v in own])
        return optimizer.slot_bytes()

    for ranks in RANKS:
        found = world(ranks, rank)
        assert sum(found) == 2 * 4 * 3456
        assert max(found) <= 2 * 4 * sum(-(-size // ranks) for size in (1024, 1024, 1024, 384))
        assert max(found) - min(found) <= 2 * 4 * 4  # an element for each bucket


def test_slots_of_layerwise_rules_are_given_away_whole_the_largest_first():
    # Of sizes 4 lines, 3, 2, 2 and 1 two ranks get 4 + 2 and 3 + 2, then 1 more: 6 lines each.
    def rank(communicator):
        sizes = {"a": 128, "b": 256, "c": 64, "d": 192, "e": 128}
        own = [Variable(np.ones(size, "f4"), name=name) for name, size in sizes.items()]
        Arena(own)
        optimizer = LAMB(gradient_aggregator=Sharded(communicator, "sum"))
        optimizer.apply_gradients([(np.ones(v.shape, "f4"), v) for v in own])
        return optimizer.slot_bytes()

    assert world(1, rank) == [2 * 4 * 64 * 12]
    assert world(2, rank) == [2 * 4 * 64 * 6] * 2
    assert max(world(4, rank)) == 2 * 4 * 64 * 4


def test_slots_outside_an_arena_are_given_away_whole():
    def rank(communicator):
        own = [Variable(np.ones(10, "f4"), name=name) for name in "abcd"]
        optimizer = Adam(gradient_aggregator=Sharded(communicator, "sum"))
        optimizer.apply_gradients([(np.ones(10, "f4"), v) for v in own])
        return optimizer.slot_bytes()

    assert world(2, rank) == [2 * 2 * 40] * 2
    assert world(4, rank) == [2 * 40] * 4


def test_averages_of_keras_new_are_divided_too():
    def rank(communicator):
        w = Variable(np.ones(1024, "f4"), name="w")
        Arena([w])
        optimizer = keras_new.Adam(use_ema=True, gradient_aggregator=Sharded(communicator, "sum"))
        optimizer.apply_gradients([(np.ones(1024, "f4"), w)])
        optimizer.finalize_variable_values([w])
        return optimizer.slot_bytes(), w.numpy()

    (first, whole), (second, also) = world(2, rank)
    assert (first, second) == (3 * 4 * 512, 3 * 4 * 512)
    np.testing.assert_array_equal(whole, also)
    # One update by 0.001, averaged with 0.99: 1 - 0.001 * 0.01.
    np.testing.assert_allclose(whole, np.full(1024, 1 - 0.00001), rtol=0, atol=1e-7)


def test_a_slot_of_which_a_rank_has_a_part_only_is_no_slot_to_be_got():
    def rank(communicator):
        own = variables()
        Arena(own)
        adam = Adam(gradient_aggregator=Sharded(communicator, "sum", BUCKET))
        adam.apply_gradients([(np.ones(v.shape, "f4"), v) for v in own])
        whole = tf1.AdamOptimizer(gradient_aggregator=Sharded(communicator, "sum", BUCKET))
        whole.apply_gradients([(np.ones(v.shape, "f4"), v) for v in own])
        for optimizer in (adam, whole):
            with pytest.raises(KeyError, match=r"divided among the ranks.*state\(\) on all ranks"):
                optimizer.get_slot(own[0], "m")
            assert "m" in optimizer.get_slot_names()
        assert whole.get_slot(own[0], "other") is None
        return adam.is_divided

    assert world(2, rank) == [True, True]


@pytest.mark.parametrize("build", [Adam, LAMB, lambda **o: keras_new.Adam(use_ema=True, **o)])
@pytest.mark.parametrize("arena", [True, False])
def test_a_checkpoint_goes_on_with_any_number_of_ranks_divided_or_not(build, arena):
    def rank(communicator, aggregator, saved, first, last):
        own = variables()
        if saved is not None:
            for variable in own:
                variable.assign(saved[variable.name])
        if arena:
            Arena(own)
        optimizer = build(gradient_aggregator=aggregator(communicator, "sum", BUCKET))
        if saved is not None:
            state = {k.removeprefix("state:"): v for k, v in saved.items() if k.startswith("state:")}
            optimizer.load_state(state, own)
        for step in range(first, last):
            optimizer.apply_gradients(
                zip(shares(step, communicator.size, communicator.rank), own, strict=True)
            )
        return seen(optimizer, own)

    def run(ranks, aggregator, saved, first, last):
        return world(ranks, lambda communicator: rank(communicator, aggregator, saved, first, last))[0]

    wanted = run(1, AllReduce, None, 0, 4)
    before = {
        (ranks, aggregator): run(ranks, aggregator, None, 0, 2)
        for ranks, aggregator in ((1, AllReduce), (4, Sharded), (3, Sharded))
    }
    for saved in before.values():
        for ranks, aggregator in ((1, AllReduce), (2, AllReduce), (1, Sharded), (2, Sharded), (4, Sharded)):
            equal(run(ranks, aggregator, saved, 2, 4), wanted)


def test_weights_are_got_and_set_whole():
    def rank(communicator):
        first, _ = trained(communicator, lambda **o: Adam(0.1, **o), Sharded)
        second, _ = trained(communicator, lambda **o: Adam(0.1, **o), Sharded, steps=1)
        second.set_weights(first.get_weights())
        for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        with pytest.raises(ValueError, match=r"shape \(2, 2, 3\)"):
            second.set_weights([*first.get_weights()[:-1], np.ones(2)])
        return [w.shape for w in first.get_weights()]

    assert world(2, rank) == [[(), *SHAPES, *SHAPES]] * 2


def test_weights_of_a_loss_scale_are_got_and_set_whole():
    def rank(communicator):
        aggregator = Sharded(communicator, "sum")
        optimizer = LossScaleOptimizer(Adam(0.1, gradient_aggregator=aggregator), initial_scale=8.0)
        own = variables()
        Arena(own)
        optimizer.apply_gradients([(np.ones(v.shape, "f4"), v) for v in own])
        weights = optimizer.get_weights()
        optimizer.set_weights([np.float32(4.0), np.int64(3), *weights[2:]])
        assert (optimizer.loss_scale, optimizer.is_divided) == (4.0, True)
        return optimizer.slot_bytes(), [w.shape for w in weights]

    # Three variables of a line each: 192 elements, two slots.
    assert world(2, rank) == [(2 * 4 * 96, [(), (), (), *SHAPES, *SHAPES])] * 2


def test_a_loss_scale_leaves_out_a_step_whose_infinity_one_rank_has():
    def rank(communicator):
        own = variables()
        Arena(own)
        optimizer = LossScaleOptimizer(Adam(0.1, gradient_aggregator=Sharded(communicator, "sum", BUCKET)))
        gradients = [np.ones(v.shape, "f4") for v in own]
        if communicator.rank == 1:
            gradients[0][2, 3] = np.inf  # in a part of one rank only
        optimizer.apply_gradients(zip(gradients, own, strict=True))
        return optimizer.step, optimizer.loss_scale

    assert world(3, rank) == [(0, 2.0**14)] * 3


class Ported(Optimizer):
    """By Keras' hooks, with a slot and a count that every update of a variable adds to."""

    def __init__(self, **options):
        super().__init__(hyperparameters={"learning_rate": 0.1}, **options)
        self.updates = self.add_weight("updates")

    def _create_slots(self, var_list):
        for variable in var_list:
            self.add_slot(variable, "velocity")

    def _resource_apply_dense(self, grad, var):
        velocity = self.get_slot(var, "velocity")
        velocity.assign(0.9 * velocity.value + grad)
        self.updates.assign_add(1.0)
        var.assign_sub(0.1 * velocity.value / self.updates.value)


def test_an_optimizer_of_hooks_keeps_whole_slots_and_says_so(caplog):
    both(3, Ported)
    assert any(
        "'Ported' keeps all of its state on every rank: it updates by hooks" in m for m in caplog.messages
    )


def test_an_optimizer_without_slots_says_that_nothing_is_divided(caplog):
    both(2, lambda **o: SGD(0.1, **o))
    assert any("'SGD' keeps all of its state on every rank: it has no slots" in m for m in caplog.messages)


@elementwise
def sharded_signum(value, gradient, momentum, *, learning_rate):
    """For a test: momentum's sign."""
    momentum = 0.9 * momentum + gradient
    value = value - learning_rate * (momentum / (abs(momentum) + 1e-3))
    return value, momentum


class WithCounts(Optimizer):
    """A rule of one's own, and a slot beside that `finish` writes."""

    rule, slots = sharded_signum, {"momentum": 0.0}

    def __init__(self, **options):
        super().__init__(hyperparameters={"learning_rate": 0.1}, **options)

    def _create_slots(self, var_list):
        super()._create_slots(var_list)
        for variable in var_list:
            self.add_slot(variable, "largest")
            self.listed = var_list

    def finish(self):
        for variable in self.listed:
            largest = self.get_slot(variable, "largest")
            largest.assign(np.maximum(largest.value, abs(variable.value)))


@pytest.mark.parametrize("arena", [True, False])
def test_extra_slots_of_an_own_optimizer_stay_whole(arena):
    both(3, WithCounts, arena=arena)


def test_variables_may_enter_an_arena_after_the_first_steps():
    def rank(communicator, aggregator):
        own = variables()
        optimizer = Adam(0.1, gradient_aggregator=aggregator(communicator, "sum", BUCKET))
        for step in range(4):
            if step == 2:
                Arena(own)
            optimizer.apply_gradients(
                zip(shares(step, communicator.size, communicator.rank), own, strict=True)
            )
        return seen(optimizer, own)

    wanted = world(1, lambda communicator: rank(communicator, AllReduce))[0]
    for ranks in RANKS:
        for found in world(ranks, lambda communicator: rank(communicator, Sharded)):
            equal(found, wanted)


def test_slots_that_are_whole_are_divided_when_an_aggregator_comes():
    def rank(communicator):
        own = variables()
        Arena(own)
        optimizer = Adam(0.1)
        for step in range(4):
            if step == 2:
                optimizer.gradient_aggregator = Sharded(communicator, "sum", BUCKET)
            alone = step < 2
            pairs = shares(step, 1 if alone else communicator.size, 0 if alone else communicator.rank)
            optimizer.apply_gradients(zip(pairs, own, strict=True))
        return seen(optimizer, own), optimizer.slot_bytes()

    # 192 elements: 38 buckets of five, cut into 2, 2 and 1, and one of two, cut into 1, 1 and 0.
    ((wanted, whole),) = world(1, rank)
    divided = world(3, rank)
    assert whole == 2 * 4 * 192
    assert [size for _, size in divided] == [2 * 4 * 77, 2 * 4 * 77, 2 * 4 * 38]
    for found, _ in divided:
        equal(found, wanted)


def test_another_aggregator_can_t_take_over_divided_slots():
    def rank(communicator):
        optimizer, own = trained(communicator, lambda **o: Adam(0.1, **o), Sharded)
        optimizer.gradient_aggregator = Sharded(communicator, "sum")
        with pytest.raises(RuntimeError, match=r"divided by another aggregator.*load_state"):
            optimizer.apply_gradients([(np.ones(v.shape, "f4"), v) for v in own])

    world(2, rank)


def test_moving_averages_follow_the_whole_values():
    def rank(communicator, aggregator):
        optimizer, own = trained(communicator, lambda **o: Adam(0.1, **o), aggregator)
        averages = optimizers.ExponentialMovingAverage(0.5)
        averages.track(own)
        optimizer.apply_gradients([(np.ones(v.shape, "f4"), v) for v in own], examples=1)
        averages.apply(own)
        return {v.name: averages.average(v).numpy() for v in own}

    wanted = world(3, lambda communicator: rank(communicator, AllReduce))[0]
    for found in world(3, lambda communicator: rank(communicator, Sharded)):
        equal(found, wanted)


def test_buckets_cover_a_slab():
    own = [Variable(np.ones(100, "f4"), name="w")]
    (slab,) = Arena(own).slabs
    assert bucket_slices(slab, 400) == [slice(0, 100), slice(100, 128)]
    assert bucket_slices(slab, 1)[:2] == [slice(0, 1), slice(1, 2)]
