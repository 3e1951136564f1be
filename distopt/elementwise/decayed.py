"""Derive a rule from a rule: the same formula on values that have first shrunk by a share of themselves.

Decoupled weight decay comes before whatever an optimizer does, so it needs no formula of its own for
each optimizer: it is put in front of the ones there are. The result is one rule, hence one pass over the
arrays, with the bits of a decay in a pass of its own.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from distopt.elementwise.formula import Formula, Node, Signature
from distopt.elementwise.rule import Rule, elementwise

__all__ = ["SHARE", "decayed"]

SHARE = "decay_share"
"""The scalar that a decayed rule has more than the original: value -= decay_share * value comes first."""


@functools.cache
def decayed(rule: Rule) -> Rule:
    """Return the rule that computes `value = value - decay_share * value` and then does what `rule` does.

    `value` stands for the rule's first array. The new rule is named `<name>_with_decay`, is in the registry,
    and is made once: asking again gives the same one.

    Args:
        rule: any rule that updates its first array and has no scalar named "decay_share".

    Raises:
        ValueError: it isn't one of these.
    """
    name = f"{rule.name}_with_decay"
    if SHARE in rule.scalars or rule.arrays[0] not in rule.outputs:
        raise ValueError(
            f"weight decay can't be put in front of {rule.name}, which takes the scalars {rule.scalars} "
            f"and updates {rule.outputs}: it must update {rule.arrays[0]!r} and have no scalar {SHARE!r}"
        )

    @functools.wraps(rule.function)
    def function(value: Any, *arrays: Any, decay_share: float, **settings: Any) -> Any:
        return rule.function(value - decay_share * value, *arrays, **settings)

    function.__name__ = name
    function.__qualname__ = f"{rule.function.__qualname__}_with_decay"
    signature = Signature(rule.arrays, (*rule.scalars, SHARE), rule.options, rule.defaults)
    formulas = {setting: _shrunk(formula, name, rule.arrays[0]) for setting, formula in rule.formulas.items()}
    return elementwise.add(Rule(function, (signature, formulas)))


def _shrunk(formula: Formula, name: str, value: str) -> Formula:
    """Put the decay in front: what read the array reads the difference instead."""
    scalars = (*formula.scalars, SHARE)
    array = Node("array", label=value, varies=True)
    if array not in formula.nodes and value in formula.results:
        return replace(formula, name=name, scalars=scalars)  # the old value doesn't matter, shrunk or not
    before = (
        array,
        Node("scalar", label=SHARE),
        Node("multiply", (1, 0), varies=True),
        Node("subtract", (0, 2), varies=True),
    )
    nodes, places = [*before], dict[int, int]()
    for old, node in enumerate(formula.nodes):
        if node == array:
            places[old] = len(before) - 1
            continue
        places[old] = len(nodes)
        nodes.append(replace(node, arguments=tuple(places[argument] for argument in node.arguments)))
    results = {key: places[place] for key, place in formula.results.items()}
    arrays = formula.arrays if value in formula.arrays else (value, *formula.arrays)
    return replace(
        formula,
        name=name,
        arrays=arrays,
        scalars=scalars,
        nodes=tuple(nodes),
        results={value: len(before) - 1, **results},
    )
