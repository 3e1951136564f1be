"""What one rank knows and all must act on: signals to stop, input that failed, values that are not finite."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable

from distopt.aggregators import NotFinite, Ticket, first_not_finite
from distopt.communicators import Communicator
from distopt.replica import Batch, Replica
from distopt.signals import MEANING, SignalNotes

__all__ = ["StopSignals", "failed_input", "places_not_finite", "stop_reasons"]

_log = logging.getLogger("distopt")


class StopSignals(SignalNotes):
    """Notes the signals that ask this rank to stop; all ranks hear of it by the ticket of the next step.

    SIGUSR1 counts as preemption: batch systems send it before they take a machine away, and it is the one
    signal that every launcher passes on. It ends a training like SIGTERM and SIGINT, after a whole step.
    """

    def ticket(self) -> Ticket:
        """Return this rank's wish, for the ticket of a step."""
        preempted = self.asked == signal.SIGUSR1
        return Ticket(stop=float(self.asked is not None and not preempted), preempt=float(preempted))

    def reasons(self, communicator: Communicator) -> str:
        """Return which ranks were asked to stop, and why. Collective."""
        return stop_reasons(self, communicator)


def stop_reasons(notes: SignalNotes, communicator: Communicator) -> str:
    """Return which ranks were asked to stop, and why; empty where none was. Collective."""
    own = "" if notes.asked is None else f"{_named(communicator)} got {MEANING[notes.asked]}"
    return "; ".join(filter(None, communicator.all_gather_object(own)))


def failed_input(error: Exception, communicator: Communicator) -> Ticket:
    """Return the ticket of a rank whose input failed; the aggregator raises on all ranks then.

    The rank computes its step on empty batches, so that it takes part in every collective, and says here
    what happened, with the traceback.

    Raises:
        Exception: `error` itself, where there is one rank.
    """
    if communicator.size == 1:
        raise error
    _log.error("%s can't make its batch: %s", _named(communicator), error, exc_info=error)
    return Ticket(error=1.0, reason=f"its input failed: {type(error).__name__}: {error}")


def places_not_finite(
    communicator: Communicator,
    work: Iterable[tuple[Replica, Batch]],
    scale: float,
    total: NotFinite | None,
) -> str:
    """Compute the step's own gradients once more, and return where they are not finite. Collective.

    The reduction has overwritten them in the arena; statistics are as before afterwards.

    Args:
        communicator: the ranks.
        work: this rank's replicas and what each was given, in this order.
        scale: of the loss.
        total: the first place of the reduced gradients that is not finite.

    Returns:
        A sentence for each rank that has such a place, or one that says that the sum over ranks overflowed;
        empty where all is finite.
    """
    own: NotFinite | None = None
    for replica, batch in work:  # all of it: a model may communicate in its passes
        tape, loss, _ = replica.forward(batch)
        replica.restore_statistics()
        stream = replica.gradients(tape, loss, scale)
        places = [(v.number, first_not_finite([(g, v)])) for g, v in stream]
        found = [place for _, place in sorted(places, key=lambda item: item[0]) if place is not None]
        own = own or (found[0] if found else None)
    said = "" if own is None else f"{_named(communicator)}: {own.what}"
    everyone = list(filter(None, communicator.all_gather_object(said)))
    if not everyone and total is not None:
        return f"each rank's own gradients are finite, but of their sum over ranks {total.what}"
    return "; ".join(everyone)


def _named(communicator: Communicator) -> str:
    return f"rank {communicator.rank} on {communicator.host}"
