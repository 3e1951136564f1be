"""What a sparse gradient updates, optimizer by optimizer: section 1.4 of the reference, row by row."""

import numpy as np
import pytest
from every import make

from distopt.variables import IndexedSlices, Variable

# Which rows of the variable move; which rows of the slots change.
LISTED = ("listed", "listed")
ALL = ("all", "all")
HYBRID = ("listed", "all")

TABLE = [
    ("SGD", {}, LISTED),
    ("SGD", {"momentum": 0.5}, LISTED),
    ("SGD", {"momentum": 0.5, "nesterov": True}, LISTED),
    ("Adagrad", {}, LISTED),
    ("Adadelta", {"learning_rate": 1.0}, LISTED),
    ("Adam", {}, ALL),
    ("Adam", {"amsgrad": True}, ALL),
    ("Adamax", {}, LISTED),
    ("Nadam", {}, HYBRID),
    ("RMSprop", {}, HYBRID),
    ("RMSprop", {"centered": True, "epsilon": 0.5}, HYBRID),
    ("RMSprop", {"momentum": 0.5}, LISTED),
    ("RMSprop", {"momentum": 0.5, "centered": True, "epsilon": 0.5}, LISTED),
    ("Ftrl", {"l1_regularization_strength": 0.25}, LISTED),
    ("tf1.GradientDescentOptimizer", {}, LISTED),
    ("tf1.MomentumOptimizer", {}, LISTED),
    ("tf1.AdagradOptimizer", {}, LISTED),
    ("tf1.AdagradDAOptimizer", {}, LISTED),
    ("tf1.AdadeltaOptimizer", {"learning_rate": 1.0}, LISTED),
    ("tf1.AdamOptimizer", {}, ALL),
    ("tf1.FtrlOptimizer", {"l2_shrinkage_regularization_strength": 0.25}, LISTED),
    ("tf1.RMSPropOptimizer", {"momentum": 0.5}, LISTED),
    ("tf1.RMSPropOptimizer", {"centered": True, "epsilon": 0.5}, LISTED),
    ("tf1.ProximalGradientDescentOptimizer", {"l1_regularization_strength": 0.25}, LISTED),
    ("tf1.ProximalAdagradOptimizer", {"l2_regularization_strength": 0.25}, LISTED),
    ("LazyAdam", {}, LISTED),
    ("contrib.LazyAdamOptimizer", {}, LISTED),
    ("contrib.MomentumWOptimizer", {}, LISTED),
    ("contrib.SGDW", {"momentum": 0.5}, LISTED),
    ("AdamW", {}, ALL),
    ("LAMB", {}, ALL),
    ("Lion", {"learning_rate": 0.1}, ALL),
    ("keras_new.SGD", {"momentum": 0.5, "nesterov": True}, ALL),
    ("keras_new.Adam", {}, ALL),
    ("keras_new.Adagrad", {}, LISTED),  # dense zeros change nothing, either
    ("keras_new.Adadelta", {"learning_rate": 1.0}, ALL),
    ("keras_new.Adamax", {}, ALL),
    ("keras_new.Nadam", {}, ALL),
    ("keras_new.RMSprop", {"momentum": 0.5}, ALL),
    ("keras_new.RMSprop", {}, ALL),
    ("keras_new.Ftrl", {}, ALL),
]
rows_of_the_table = pytest.mark.parametrize(
    ("name", "options", "moves"), TABLE, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(TABLE)]
)

ROWS = 5
INDICES = [3, 1, 3, 1, 3]  # neither sorted nor unique
LISTED_ROWS = [1, 3]


def dense(step, width):
    return np.random.default_rng(step).integers(-3, 4, (ROWS, *width)).astype(np.float64)


def slices(step, width):
    """Slices of small whole numbers, whose sums are exact in any order."""
    values = np.random.default_rng(step).integers(1, 4, (len(INDICES), *width)).astype(np.float64)
    return IndexedSlices(values, INDICES, (ROWS, *width))


def summed(gradient):
    found = np.zeros(gradient.dense_shape)
    np.add.at(found, gradient.indices, gradient.values)
    return found


def table(width):
    return Variable(np.random.default_rng(9).standard_normal((ROWS, *width)), name="table")


def contents(optimizer, variable):
    slots = {name: optimizer.get_slot(variable, name).numpy() for name in optimizer.get_slot_names()}
    return {"": variable.numpy(), **slots}


@rows_of_the_table
@pytest.mark.parametrize("width", [(), (2,), (2, 3)], ids=["scalars", "vectors", "matrices"])
def test_rows_are_updated_as_the_table_says(name, options, moves, width):
    # Dense, sparse, sparse, dense: mixed use of one variable is allowed.
    sparse, zeros = make(name, **options), make(name, **options)
    own, twin = table(width), table(width)
    for step in range(4):
        given = slices(step, width) if step in (1, 2) else dense(step, width)
        before = contents(sparse, own)
        if step in (1, 2):  # what dense zeros in the other rows do, from the same state
            twin.assign(before[""])
            for slot in sparse.get_slot_names():
                zeros.get_slot(twin, slot).assign(before[slot])
        sparse.apply_gradients([(given, own)])
        zeros.apply_gradients([(summed(given) if step in (1, 2) else given, twin)])
        if step not in (1, 2):
            continue
        after, expected = contents(sparse, own), contents(zeros, twin)
        others = [row for row in range(ROWS) if row not in LISTED_ROWS]
        for what, value in after.items():
            rule = moves[0] if what == "" else moves[1]
            np.testing.assert_array_equal(value[LISTED_ROWS], expected[what][LISTED_ROWS], err_msg=what)
            wanted = (expected if rule == "all" else before)[what]
            np.testing.assert_array_equal(value[others], wanted[others], err_msg=what)
        assert not np.array_equal(after[""][LISTED_ROWS], before[""][LISTED_ROWS])


@rows_of_the_table
def test_duplicates_are_summed_before_the_rule(name, options, moves):
    found = []
    for repeats in (True, False):
        optimizer, own = make(name, **options), table((2,))
        for step in range(3):
            given = slices(step, (2,))
            if not repeats:
                given = IndexedSlices(summed(given)[LISTED_ROWS], LISTED_ROWS, (ROWS, 2))
            optimizer.apply_gradients([(given, own)])
        found.append(contents(optimizer, own))
    for what, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][what], err_msg=what)


@rows_of_the_table
def test_a_constraint_refuses_a_sparse_gradient_and_nothing_changes(name, options, moves):
    own = table((2,))
    own.constraint = lambda value: value
    before = own.numpy()
    optimizer = make(name, **options)
    with pytest.raises(RuntimeError, match="Cannot use a constraint function on a sparse variable"):
        optimizer.apply_gradients([(slices(1, (2,)), own)])
    np.testing.assert_array_equal(own.numpy(), before)
    assert optimizer.iterations == 0


def test_squares_are_taken_of_the_sum():
    # Two gradients of 1 for row 0: A = 0 + (1 + 1)^2 and not 1 + 1.
    optimizer, own = make("Adagrad", initial_accumulator_value=0.0), Variable(np.zeros((2, 1)), name="w")
    optimizer.apply_gradients([(IndexedSlices([[1.0], [1.0]], [0, 0], (2, 1)), own)])
    assert optimizer.get_slot(own, "accumulator").numpy().ravel().tolist() == [4.0, 0.0]


def test_the_momentum_of_other_rows_is_frozen():
    optimizer, own = make("SGD", learning_rate=1.0, momentum=0.5), Variable(np.zeros((2, 1)), name="w")
    optimizer.apply_gradients([(np.ones((2, 1)), own)])
    for _ in range(3):
        optimizer.apply_gradients([(IndexedSlices([[0.0]], [0], (2, 1)), own)])
    assert own.numpy().ravel().tolist() == [-1.875, -1.0]
    optimizer.apply_gradients([(np.zeros((2, 1)), own)])
    assert own.numpy().ravel().tolist() == [-1.9375, -1.5]


def test_adamaxs_correction_counts_all_updates():
    # Row 1 has its first gradient in the second update: lr / (1 - 0.5^2) and not lr / (1 - 0.5).
    optimizer = make("Adamax", learning_rate=0.75, beta_1=0.5, beta_2=0.5, epsilon=1e-30)
    own = Variable(np.zeros((2, 1)), name="w")
    optimizer.apply_gradients([(IndexedSlices([[2.0]], [0], (2, 1)), own)])
    optimizer.apply_gradients([(IndexedSlices([[2.0]], [1], (2, 1)), own)])
    assert own.numpy().ravel().tolist() == [-0.75, -0.5]
