import pytest

from distopt import scopes


@pytest.fixture(autouse=True)
def graph():
    with scopes.Graph(seed=1).as_default() as graph:
        yield graph
