"""The programs of docs/extending.md, by the name in their first line."""

import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (.*?)\n(.*?)```", PAGE, re.DOTALL))


def program(name):
    """Run a block; return what it defines."""
    defined = {"__name__": "extending"}
    exec(compile(BLOCKS[name], f"extending.md: {name}", "exec"), defined)
    return defined


def medians(communicator, steps=2, arena=False):
    """Aggregate known gradients by the page's aggregator, rank r having r examples; return the medians."""
    from distopt.variables import Arena, Variable

    aggregator = program("aggregator")["MedianOfRanks"](communicator)
    variables = [Variable([0.0] * 3, name="w"), Variable(0.0, name="b"), Variable(0.0, name="unused")]
    if arena:
        Arena(variables)
    w, b, unused = variables
    rank = communicator.rank
    results = []
    for step in range(steps):
        # What the rank's mean is; only rank 1 has a gradient of b.
        mean = [rank + step, 10.0 * rank, 101.0 if rank == communicator.size - 1 else 1.0]
        pairs = [([rank * m for m in mean], w), (7.0 if rank == 1 else None, b), (None, unused)]
        results.append(aggregator.aggregate(pairs[:: 1 if rank % 2 else -1], examples=rank))
    assert aggregator.ready == (communicator.size > 1)
    assert aggregator.ticket.examples == communicator.size * (communicator.size - 1) / 2
    return [{variable.name: gradient for gradient, variable in pairs} for pairs in results]


def check_medians(communicator, results):
    """Compare with medians over the ranks that have examples: 1, 2, ... size - 1."""
    voters = range(1, communicator.size)
    for step, found in enumerate(results):
        assert found["unused"] is None
        if not voters:
            assert found["w"] is None
            continue
        middle = (1 + communicator.size - 1) / 2
        third = {1: 101.0, 2: 51.0}.get(len(voters), 1.0)
        assert found["w"].tolist() == [middle + step, 10 * middle, third]
        assert float(found["b"]) == 7.0
