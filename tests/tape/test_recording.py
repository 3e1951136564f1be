"""What a tape records, and when."""

import threading

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape, Tensor
from distopt.variables import Variable


def test_only_watched_things_are_recorded():
    fixed = Variable(2.0, trainable=False)
    counter = Variable(3)
    with GradientTape() as tape:
        y = fixed * 3.0
    assert tape.gradient(y, fixed) is None
    with GradientTape() as tape:
        tape.watch(fixed)
        y = fixed * 3.0
    assert float(tape.gradient(y, fixed)) == 3.0
    with GradientTape() as tape:
        tape.watch(counter)
        y = counter * 2
    assert tape.gradient(y, counter) is None
    with pytest.raises(ValueError, match=r"Passed in object of type <class 'numpy\.ndarray'>, not a Tensor"):
        tape.watch(np.zeros(3))


def test_a_watched_tensor_in_the_middle_gets_its_gradient_and_passes_it_on():
    x = Variable(2.0)
    with GradientTape() as tape:
        y = x * x
        tape.watch(y)
        z = y * 3.0
    by_x, by_y = tape.gradient(z, [x, y])
    assert (float(by_x), float(by_y)) == (12.0, 3.0)


def test_stop_recording_leaves_out_what_is_computed_meanwhile():
    x = Variable(2.0)
    with GradientTape() as tape:
        y = x * x
        with tape.stop_recording():
            factor = x * 10.0
        z = y * factor
    assert float(tape.gradient(z, x)) == pytest.approx(20.0 * 4.0)


def test_nested_things_can_be_watched():
    tensors = [Tensor(np.float64(n)) for n in (1.0, 2.0, 3.0)]
    with GradientTape() as tape:
        tape.watch({"a": tensors[0], "b": [tensors[1], (tensors[2],)]})
        y = tensors[0] * tensors[1] * tensors[2]
    assert [float(g) for g in tape.gradient(y, tensors)] == [6.0, 3.0, 2.0]


def test_variables_are_not_watched_by_themselves_where_that_is_switched_off():
    x, y = Variable(2.0), Variable(3.0)
    with GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(y)
        z = x * y
    assert tape.watched_variables() == (y,)
    by_x, by_y = tape.gradient(z, [x, y])
    assert (by_x, float(by_y)) == (None, 2.0)


def test_watched_variables_are_those_used_and_those_watched():
    used, watched, unused = Variable(1.0), Variable(2.0, trainable=False), Variable(3.0)
    with GradientTape() as tape:
        tape.watch([watched, Tensor(np.ones(2))])
        y = used * 2.0
    assert tape.watched_variables() == (used, watched)
    tape.gradient(y, used)
    assert tape.watched_variables() == (used, watched)
    assert unused not in tape.watched_variables()


def test_a_tape_that_records_can_not_be_entered_again():
    tape = GradientTape()
    with (
        tape,
        pytest.raises(ValueError, match="Tape is still recording, This can happen if you try to re-enter"),
    ):
        tape.__enter__()


def test_a_tape_entered_again_later_goes_on_recording():
    x = Variable(3.0)
    tape = GradientTape()
    with tape:
        y = x * x
    outside = x * 10.0
    with tape:
        z = y * x + outside
    assert float(tape.gradient(z, x)) == 27.0


def test_a_used_tape_entered_again_begins_anew():
    x = Variable(3.0)
    tape = GradientTape()
    with tape:
        y = x * x
    tape.gradient(y, x)
    with tape:
        z = y * x
    assert float(tape.gradient(z, x)) == 9.0


def test_stop_recording_twice_on_one_tape():
    x = Variable(2.0)
    with GradientTape() as tape:
        with tape.stop_recording():
            a = x * x
        y = x * a
        with tape.stop_recording():
            b = x * y
        z = y * b
    # a and b are the constants 4 and 16.
    assert float(tape.gradient(z, x)) == 64.0


def test_the_tape_can_be_entered_while_its_recording_is_stopped():
    x = Variable(2.0)
    with GradientTape() as tape:
        with tape.stop_recording():
            a = x * x
            with tape:
                b = x * 5.0
            c = x * 7.0
        y = a + b + c + x
    assert float(tape.gradient(y, x)) == 6.0


def test_an_inner_tape_records_while_the_outer_one_is_stopped():
    x = Variable(3.0)
    with GradientTape() as outer:
        with outer.stop_recording():
            with GradientTape() as inner:
                y = x * x
            dy = inner.gradient(y, x)
        z = x * dy
    assert not isinstance(dy, Tensor)
    assert float(outer.gradient(z, x)) == 6.0


def test_stop_recording_records_again_after_an_exception():
    x = Variable(3.0)
    with GradientTape() as tape:
        with pytest.raises(KeyError), tape.stop_recording():
            raise KeyError("user's")
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0


def test_stop_recording_of_a_tape_that_does_not_record_is_refused():
    x = Variable(3.0)
    tape = GradientTape()
    with pytest.raises(RuntimeError, match="Trying to stop recording a tape which is not recording"):
        tape.stop_recording().__enter__()
    with tape:
        tape.gradient(x * x, x)
        with pytest.raises(RuntimeError, match="Trying to stop recording a tape which is not recording"):
            tape.stop_recording().__enter__()


def test_reset_forgets_what_was_recorded_and_watched():
    x, fixed = Variable(3.0), Variable(4.0, trainable=False)
    with GradientTape(persistent=True) as tape:
        tape.watch(fixed)
        before = x * x
        tape.reset()
        assert tape.watched_variables() == ()
        assert (before * 2.0).node is None
        after = before * x * fixed
    assert tape.gradient(before, x) is None
    assert float(tape.gradient(after, x)) == 36.0
    assert tape.gradient(after, fixed) is None


def test_reset_outside_the_block_is_refused():
    tape = GradientTape()
    with pytest.raises(ValueError, match="Tape is not recording"):
        tape.reset()


def test_a_tape_records_its_own_thread_alone():
    x = Variable(3.0)
    found = []
    with GradientTape() as tape:
        thread = threading.Thread(target=lambda: found.append(x * x))
        thread.start()
        thread.join()
    assert found[0].node is None
    assert tape.watched_variables() == ()


def test_nothing_is_kept_where_no_tape_watches():
    x = Tensor(np.ones((2, 2)))
    with GradientTape():
        y = ops.matmul(x, x)
    assert y.node is None
