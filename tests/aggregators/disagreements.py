"""Ways in which the variables of one rank can differ from the others', for threads and for mpirun."""

import numpy as np

from distopt.aggregators import AllReduce, Ticket
from distopt.variables import Arena, Variable


def model(wrong=None, arena=False):
    """Return four variables; `wrong` names in what they differ."""
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}
    dtypes = dict.fromkeys(shapes, "f4")
    if wrong == "shape":
        shapes["w2"] = (4, 3)
    elif wrong == "transposed":
        shapes["w2"] = (2, 4)
    elif wrong == "dtype":
        dtypes["b1"] = "f8"
    elif wrong == "name":
        shapes = {("other" if n == "b1" else n): s for n, s in shapes.items()}
    elif wrong == "order":
        shapes = {name: shapes[name] for name in ("w1", "w2", "b1", "b2")}
    elif wrong == "one more":
        shapes["extra"] = (1,)
    elif wrong == "one less":
        del shapes["b2"]
    elif wrong == "none":
        shapes = {}
    variables = [Variable(np.zeros(s, dtypes.get(n, "f4")), name=n) for n, s in shapes.items()]
    if arena and wrong != "no arena" and variables:
        _arena(variables, wrong)
    return variables


def _arena(variables, wrong):
    if wrong == "two arenas":
        Arena(variables[:2])
        Arena(variables[2:])
    elif wrong == "arena's order":
        Arena(variables[::-1])
    elif wrong == "arena's end":
        Arena([Variable(np.zeros(100, "f4"), name="hidden"), *variables])
    else:
        Arena(variables)


# Kind -> what the message says of the rank that differs.
ANYWHERE = {
    "shape": "variable 2 is 'w2' float32[4, 3]",
    "transposed": "variable 2 is 'w2' float32[2, 4]",
    "dtype": "variable 1 is 'b1' float64[4]",
    "name": "variable 1 is 'other' float32[4]",
    "order": "variable 1 is 'w2' float32[4, 2]",
    "one more": "5 variables there and 4 on rank 0; 'extra' float32[1]",
    "one less": "3 variables there and 4 on rank 0; 'b2' float32[2]",
    "none": "0 variables there and 4 on rank 0; 'w1' float32[3, 4]",
}
IN_ARENA = {
    "no arena": "variable 0 is 'w1' float32[3, 4] there",
    "two arenas": "variable 0 is 'w1' float32[3, 4] in an arena (slab 0 of 128 elements, from element 64)",
    "arena's order": "variable 0 is 'w1' float32[3, 4] in an arena (slab 0 of 256 elements, from element 0)",
    "arena's end": "variable 0 is 'w1' float32[3, 4] in an arena (slab 0 of 384 elements, from element 192)",
}
CONFIGURATIONS = {
    "reduction": ({"reduction": "mean"}, "AllReduce(reduction='mean', 64 bytes, sparse='auto')"),
    "bucket size": ({"bucket_bytes": 128}, "AllReduce(reduction='sum', 128 bytes, sparse='auto')"),
    "sparse mode": ({"sparse": "rows"}, "AllReduce(reduction='sum', 64 bytes, sparse='rows')"),
}


def step(communicator, variables, aggregator=None, examples=1.0, number=None, **arguments):
    """Reduce ones; returns the aggregator."""
    if aggregator is None:
        aggregator = AllReduce(communicator, **{"reduction": "sum", "bucket_bytes": 64, **arguments})
    pairs = [(np.ones(v.shape, v.dtype), v) for v in variables]
    aggregator.reduce(pairs, Ticket(examples=examples, step=number))
    return aggregator


def is_usable(communicator):
    """Whether what was left of a refused step doesn't disturb the next collectives."""
    ranks = communicator.size
    total = communicator.all_reduce(np.ones(3)).wait().tolist() == [ranks] * 3
    objects = communicator.all_gather_object(communicator.rank) == list(range(ranks))
    variables = model(arena=True)
    aggregator = step(communicator, variables)
    step(communicator, variables, aggregator)
    return total and objects and all((v.gradient == ranks).all() for v in variables)
