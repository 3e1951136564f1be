"""Messages between pretended ranks of one thread, delivered late and out of step with one another."""

import collections
import random

import numpy as np


class FakeNetwork:
    """What ranks have sent, by (source, to, tag), in order; `seed` decides when a message arrives."""

    def __init__(self, size, seed=0):
        self.size = size
        self.random = random.Random(seed)
        self.messages = collections.defaultdict(collections.deque)
        self.largest = 0

    def links(self, rank):
        return FakeLinks(self, rank)


class FakeLinks:
    def __init__(self, network, rank):
        self.network, self.rank, self.size = network, rank, network.size
        self.expected = collections.defaultdict(collections.deque)

    def send(self, values, to, tag):
        assert values.size
        self.network.largest = max(self.network.largest, values.nbytes)
        message = {"values": values, "taken": False}
        self.network.messages[self.rank, to, tag].append(message)
        return lambda: message["taken"]  # as large messages: done when the receiver has it

    def receive(self, values, source, tag):
        queue = self.network.messages[source, self.rank, tag]
        expected = self.expected[source, tag]
        request = object()
        expected.append(request)

        def test():
            if not queue or expected[0] is not request:
                return False
            message = queue.popleft()
            assert message["values"].nbytes == values.nbytes
            values[...] = np.array(message["values"])
            message["taken"] = True
            expected.popleft()
            return True

        return test

    def test_some(self, requests):
        # Some messages stay on the way for a while.
        return [
            place
            for place, request in enumerate(requests)
            if self.network.random.random() < 0.6 and request()
        ]


def finish(pendings, progress, rounds=100_000):
    """Move all ranks on in turns until everything is done."""
    for _ in range(rounds):
        for move in progress:
            move()
        if all(pending.test() for pending in pendings):
            return
    raise AssertionError("the ranks do not get on")
