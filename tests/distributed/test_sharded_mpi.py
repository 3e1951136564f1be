"""Divided slots under mpirun: the bits of the undivided step, shares of memory, whole checkpoints."""

import numpy as np
import pytest
import training
from every import CLASSES, SHAPES, make, shares, variables

from distopt.aggregators import AllReduce, Sharded
from distopt.aggregators.sharded import ScatteredReduction
from distopt.communicators import connect
from distopt.models import Task
from distopt.optimizers import LAMB, Adam, Muon
from distopt.variables import Arena, IndexedSlices, Variable

BUCKET = 24 * 4  # bytes: every 24 elements are cut among the ranks, in the middle of the variables


class RankOrdered(AllReduce):
    """Undivided, with sums in rank order: MPI's own sum of three ranks or more has another order."""

    def _start_bucket(self, slab, part):
        return ScatteredReduction(self.communicator, slab.gradients[part], whole=True)

    def _sum_packed(self, packed, divisor, variables):
        ScatteredReduction(self.communicator, packed, whole=True).finish(divisor)


def seen(optimizer, own):
    return {v.name: v.numpy() for v in own} | {f"state:{k}": v for k, v in optimizer.state().items()}


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def gradients(step, communicator):
    """Gradients that round. Of three or more ranks the last has none; v1 is sparse in no step."""
    random = np.random.default_rng([step, communicator.rank])
    found = [random.standard_normal(shape).astype("f4") for shape in SHAPES]
    none = communicator.size > 2 and communicator.rank == communicator.size - 1
    return [None] * len(found) if none else found


def trained(communicator, name, aggregator, arena):
    own = variables()
    if arena:
        Arena(own)
    optimizer = make(name, gradient_aggregator=aggregator(communicator, "mean", BUCKET))
    for step in range(3):
        part = gradients(step, communicator)
        examples = 0 if part[0] is None else 1 + communicator.rank
        optimizer.apply_gradients(zip(part, own, strict=True), examples=examples)
    return seen(optimizer, own)


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("name", ["Adam", "Ftrl", "Nadam", "LAMB", "LARS", "Muon", "keras_new.AdamW"])
def test_a_divided_step_has_the_bits_of_the_undivided_one(communicator, name, arena):
    assert name in CLASSES
    wanted = trained(communicator, name, RankOrdered, arena)
    for found in communicator.all_gather_object(trained(communicator, name, Sharded, arena)):
        equal(found, wanted)


def test_rows_are_divided_with_their_table(communicator):
    def run(aggregator):
        random = np.random.default_rng(1)
        table = Variable(random.standard_normal((30, 7)).astype("f4"), name="table")
        Arena([table])
        optimizer = make("LazyAdam", gradient_aggregator=aggregator(communicator, "sum", BUCKET))
        for step in range(3):
            random = np.random.default_rng([step, communicator.rank])
            rows = random.integers(0, 30, 5 * communicator.rank)  # none on rank 0
            values = random.standard_normal((len(rows), 7)).astype("f4")
            optimizer.apply_gradients([(IndexedSlices(values, rows, (30, 7)), table)])
        return seen(optimizer, [table])

    equal(run(Sharded), run(RankOrdered))


def test_a_rank_keeps_its_share_of_the_memory(communicator):
    # 33 * 31 elements in lines of 64 are 1024; Adam has two slots of four bytes.
    w = Variable(np.ones((33, 31), "f4"), name="w")
    Arena([w])
    optimizer = Adam(gradient_aggregator=Sharded(communicator, "sum"))
    optimizer.apply_gradients([(np.ones((33, 31), "f4"), w)])
    everyone = communicator.all_gather_object(optimizer.slot_bytes())
    assert sum(everyone) == 2 * 4 * 1024
    assert max(everyone) == 2 * 4 * -(-1024 // communicator.size)


@pytest.mark.parametrize("build", [Adam, LAMB, lambda **o: Muon(exclude=["v2"], **o)])
def test_a_state_goes_on_alone_and_back_with_the_bits_of_one_process(communicator, build):
    def go_on(ranks, aggregator, saved, steps):
        own = variables()
        Arena(own)
        optimizer = build(gradient_aggregator=aggregator(ranks, "sum", BUCKET))
        if saved is not None:
            for variable in own:
                variable.assign(saved[variable.name])
            state = {k.removeprefix("state:"): v for k, v in saved.items() if k.startswith("state:")}
            optimizer.load_state(state, own)
        for step in steps:
            optimizer.apply_gradients(zip(shares(step, ranks.size, ranks.rank), own, strict=True))
        return seen(optimizer, own)

    with connect("local") as alone:
        wanted = go_on(alone, AllReduce, None, range(4))
        divided = go_on(communicator, Sharded, None, range(2))
        equal(go_on(alone, AllReduce, divided, range(2, 4)), wanted)
        equal(go_on(communicator, Sharded, go_on(alone, AllReduce, None, range(2)), range(2, 4)), wanted)


def test_a_training_is_resumed_with_divided_slots(communicator, tmp_path_factory):
    task = Task(**{**vars(training.TASK), "optimizer": lambda rate, examples, batch, **o: Adam(0.01, **o)})
    folder = communicator.broadcast_object(tmp_path_factory.mktemp("run"))

    def made(steps, output=None):
        settings = {"steps": steps, "output": output, "bucket_bytes": 2000, "shard_optimizer": True}
        return training.trainer(communicator, task=task, **settings)

    whole = training.state(training.run(made(8)))
    training.run(made(4, folder))
    communicator.barrier()
    second = made(8, folder)
    assert second.resume() == "resumed after step 4"
    equal(training.state(training.run(second)), whole)
