"""The programs of docs/any-gradient.md, by the name in their first line."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

_PAGE = (Path(__file__).parent.parent / "docs" / "any-gradient.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (.*?)\n(.*?)```", _PAGE, re.DOTALL))
NEEDS = {"torch": "torch", "jax": "jax", "torch model": "torch", "torch optimizer": "torch"}


def program(*names):
    """Run blocks one after the other, as a reader would put them into one file; return what they define."""
    for name in names:
        library = NEEDS.get(name)
        if library is not None and importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed; pip install 'distopt[interop]'")
    defined = {"__name__": "any_gradient"}
    for name in names:
        exec(compile(BLOCKS[name], f"any-gradient.md: {name}", "exec"), defined)
    return defined


def updates(communicator, way, steps=5):
    """Return what `steps` updates change, as one vector, by one of the four ways."""
    page = program("shared", way)
    values = page["train"](communicator, page["gradients"], steps)
    initial = page["initial_values"]().values()
    return [new - old for new, old in zip(values, initial, strict=True)]


def torch_model(page):
    """Return the page's network as a PyTorch model."""
    torch = sys.modules["torch"]
    values = page["initial_values"]()
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    with torch.no_grad():
        for layer, number in ((model[0], 1), (model[2], 2)):
            layer.weight.copy_(torch.from_numpy(values[f"w{number}"].T.copy()))
            layer.bias.copy_(torch.from_numpy(values[f"b{number}"]))
    return model
