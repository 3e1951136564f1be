"""Variables of different groups of ranks in one model: each is reduced by an aggregator of its group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from distopt.aggregators.aggregator import Aggregator, Pair
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.variables import Variable

__all__ = ["Grouped"]


class Grouped(Aggregator):
    """Reduces some variables over some ranks and others over others.

    Such as a body that all ranks share and a head of which each group of ranks has its own:

        group = world.split(color=world.rank % 2)
        Grouped({"world": AllReduce(world), "group": AllReduce(group)},
                lambda variable: "group" if variable.name.startswith("head") else "world")

    Each aggregator gets the whole ticket: means are over the examples of its own ranks. The first one is
    reduced first, while gradients still come, then the next: all ranks name them in the same order.
    `ticket` is that of the first, so let it be one over all ranks. `ready`: whether any is; the gradients
    of one that isn't are None.

    Args:
        aggregators: by name.
        choose: names the aggregator of a variable; the same on every rank that shares it.

    Raises:
        ValueError: no aggregators, or some with different `reduction`.
        TypeError: one lets ranks differ between steps, as `LocalSGD` does, or divides the optimizer's state,
            as `Sharded` does.
    """

    def __init__(self, aggregators: Mapping[str, Aggregator], choose: Callable[[Variable], str]) -> None:
        super().__init__()
        reductions = {getattr(aggregator, "reduction", "sum") for aggregator in aggregators.values()}
        if len(reductions) != 1:
            raise ValueError(
                "Grouped needs at least one aggregator, all of one reduction, as a step has one loss; got "
                f"{ {name: getattr(a, 'reduction', 'sum') for name, a in aggregators.items()} }"
            )
        for name, aggregator in aggregators.items():
            if type(aggregator).settle is not Aggregator.settle:
                raise TypeError(
                    f"Grouped can't hold {type(aggregator).__name__} ({name!r}), under which ranks update by "
                    "themselves: whether to update is decided for all variables at once"
                )
            if aggregator.ownership is not None:
                raise TypeError(
                    f"Grouped can't hold {type(aggregator).__name__} ({name!r}), which divides the slots "
                    "of an optimizer among its ranks: an optimizer has one division, for all of its "
                    "variables. Use AllReduce, or another "
                    "optimizer for the variables that are to be divided."
                )
        self.aggregators = dict(aggregators)
        self.choose = choose
        self.reduction: str = reductions.pop()
        self.communicator: Any = getattr(next(iter(self.aggregators.values())), "communicator", None)

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`.

        Raises:
            ValueError: `choose` named no aggregator, or an arena has variables of two of them.
            CommunicatorError: see the aggregators'.
        """
        first, *others = self.aggregators
        later: dict[str, list[Pair]] = {name: [] for name in self.aggregators}
        places: dict[int, tuple[str, Variable]] = {}

        def of_first() -> Iterator[Pair]:
            for gradient, variable in pairs:
                name = self._place(variable, places)
                if name == first:
                    yield gradient, variable
                else:
                    later[name].append((gradient, variable))

        parts = {first: self.aggregators[first].reduce(of_first(), ticket)}
        for name in others:
            parts[name] = self.aggregators[name].reduce(later[name], ticket)
        everyone = self.aggregators.values()
        self.ticket = self.aggregators[first].ticket
        self.ready = any(aggregator.ready for aggregator in everyone)
        self.exposed_seconds = sum(aggregator.exposed_seconds for aggregator in everyone)
        self.wire_bytes = sum(aggregator.wire_bytes for aggregator in everyone)
        return sorted((pair for part in parts.values() for pair in part), key=lambda pair: pair[1].number)

    def _place(self, variable: Variable, places: dict[int, tuple[str, Variable]]) -> str:
        name = self.choose(variable)
        if name not in self.aggregators:
            raise ValueError(
                f"choose named {name!r} for variable {variable.name!r}; there are {sorted(self.aggregators)}"
            )
        if variable.slab is None:
            return name
        before, other = places.setdefault(variable.slab.number, (name, variable))
        if before != name:
            raise ValueError(
                f"one arena has {other.name!r} of {before!r} and {variable.name!r} of {name!r}, but it is "
                "reduced as a whole; make an Arena for the variables of each"
            )
        return name

    def _own(self, name: str, variables: Sequence[Variable]) -> list[Variable]:
        return [variable for variable in variables if self.choose(variable) == name]

    def after_apply(self, variables: Sequence[Variable]) -> None:
        """Call each aggregator's with its own variables."""
        for name, aggregator in self.aggregators.items():
            aggregator.after_apply(self._own(name, variables))

    def flush(self) -> list[Pair]:
        """Return what any of them held back. Collective."""
        pairs = [pair for aggregator in self.aggregators.values() for pair in aggregator.flush()]
        self.ready = bool(pairs)
        return pairs

    def state(self) -> dict[str, Array]:
        """Return the states of all, each under its name: those of this rank's groups."""
        return {
            f"{name}/{key}": array
            for name, aggregator in self.aggregators.items()
            for key, array in aggregator.state().items()
        }

    def load_state(self, state: Mapping[str, Array], variables: Sequence[Variable]) -> None:
        """Restore what `state` gave in the same group."""
        left = dict(state)
        for name, aggregator in self.aggregators.items():
            own = [key for key in left if key.startswith(f"{name}/")]
            part = {key.removeprefix(f"{name}/"): left.pop(key) for key in own}
            aggregator.load_state(part, self._own(name, variables))
        super().load_state(left, variables)
