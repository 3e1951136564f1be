import threading

import pytest

from distopt.scopes import (
    add_arg_scope,
    arg_scope,
    arg_scoped_arguments,
    current_arg_scope,
    has_arg_scope,
)


@add_arg_scope
def first(a, b=1, c=2):
    """What first does."""
    return a, b, c


@add_arg_scope
def second(a, *, c=3, d=4):
    return a, c, d


def plain(a, b=1):
    return a, b


def test_defaults_hold_within_the_block_only():
    with arg_scope([first], b=10):
        assert first(0) == (0, 10, 2)
    assert first(0) == (0, 1, 2)


def test_defaults_reach_several_functions():
    with arg_scope((first, second), c=10):
        assert first(0) == (0, 1, 10)
        assert second(0) == (0, 10, 4)


def test_nested_scopes_add_up_the_inner_wins_and_the_outer_comes_back():
    with arg_scope([first], b=10, c=20):
        with arg_scope([first], c=30):
            assert first(0) == (0, 10, 30)
        assert first(0) == (0, 10, 20)


def test_an_argument_of_the_call_comes_first():
    with arg_scope([first], b=10):
        assert first(0, b=5) == (0, 5, 2)


def test_a_scoped_argument_passed_by_position_is_a_type_error():
    with arg_scope([first], b=10), pytest.raises(TypeError, match="multiple values"):
        first(0, 5)


def test_an_unknown_name_fails_at_the_call_only():
    with arg_scope([first], unknown=10), pytest.raises(TypeError, match="unknown"):
        first(0)


def test_a_captured_scope_replaces_what_is_in_force():
    with arg_scope([first], b=10) as captured:
        pass
    with arg_scope([first], c=20):
        with arg_scope(captured) as again:
            assert first(0) == (0, 10, 2)
            assert again == captured
        assert first(0) == (0, 1, 20)


def test_an_empty_scope_clears():
    with arg_scope([first], b=10), arg_scope({}):
        assert first(0) == (0, 1, 2)
        assert current_arg_scope() == {}


def test_a_captured_scope_is_not_changed_by_later_ones():
    with arg_scope([first], b=10) as captured, arg_scope([first], b=20, c=30):
        pass
    with arg_scope(captured), arg_scope([first], c=40):
        assert first(0) == (0, 10, 40)
    with arg_scope(captured):
        assert first(0) == (0, 10, 2)


def test_scopes_end_after_an_error():
    with pytest.raises(KeyError), arg_scope([first], b=10):
        raise KeyError
    assert first(0) == (0, 1, 2)


def test_a_captured_scope_with_further_arguments_is_refused():
    with (
        pytest.raises(ValueError, match=r"further arguments \['b'\]"),
        arg_scope({}, b=1),
    ):
        raise AssertionError("the block was entered")


def test_functions_must_be_decorated():
    with pytest.raises(ValueError, match="plain is not decorated"), arg_scope([first, plain], b=1):
        raise AssertionError("the block was entered")
    with pytest.raises(ValueError, match="plain is not decorated"):
        arg_scoped_arguments(plain)


@pytest.mark.parametrize("wrong", [first, "first", None, {1}])
def test_the_first_argument_must_be_a_list_a_tuple_or_a_scope(wrong):
    with pytest.raises(TypeError, match="list or tuple"), arg_scope(wrong, b=1):
        raise AssertionError("the block was entered")


def test_what_is_known_of_a_function():
    assert has_arg_scope(first)
    assert not has_arg_scope(plain)
    assert arg_scoped_arguments(first) == ("b", "c")
    assert arg_scoped_arguments(second) == ("c", "d")
    assert first.__name__ == "first"
    assert first.__doc__ == "What first does."


def test_threads_do_not_see_each_others_scopes():
    results = []
    with arg_scope([first], b=10):
        thread = threading.Thread(target=lambda: results.append(first(0)))
        thread.start()
        thread.join()
    assert results == [(0, 1, 2)]
