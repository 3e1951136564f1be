"""What the tests of optimize_loss share: a graph for each test, and the loss of the recorded cases."""

import pytest

from distopt import scopes
from distopt.scopes import Graph, get_variable


@pytest.fixture(autouse=True)
def graph():
    with Graph(seed=3).as_default() as graph:
        yield graph


def make_loss(value=10.0):
    """Return a variable, the global step, and the loss |variable * x|."""
    variable = get_variable("test", initializer=value)
    return variable, scopes.get_or_create_global_step(), lambda x: abs(variable * x)
