"""Scopes of TensorFlow 1: shared variables, collections, and default arguments.

`graph` holds what belongs to one copy of a model, `sharing` makes its variables, `variable_scopes`
names them and sets their defaults, `arg_scopes` gives functions default arguments within a block,
`dependencies` runs update operations, `global_step` counts.

In TensorFlow the code of a model runs once; here it runs at every step. Around it belongs

    with graph.step():  # or scopes.step(), for the default graph
        loss = model(batch)

inside which names, rules of reuse and collections are as if the code ran for the first time, while
variables keep their values: `Graph.step` says it exactly. The Trainer does it by itself.
"""

from distopt.scopes.arg_scopes import (
    add_arg_scope,
    arg_scope,
    arg_scoped_arguments,
    current_arg_scope,
    has_arg_scope,
)
from distopt.scopes.dependencies import UpdateOp, control_dependencies, run_update_ops
from distopt.scopes.global_step import (
    assert_global_step,
    create_global_step,
    get_global_step,
    get_or_create_global_step,
)
from distopt.scopes.graph import (
    Graph,
    GraphKeys,
    add_to_collection,
    add_to_collections,
    ensure_step,
    get_collection,
    get_collection_ref,
    get_default_graph,
    get_name_scope,
    global_variables,
    local_variables,
    model_variables,
    moving_average_variables,
    name_scope,
    reset_default_graph,
    step,
    trainable_variables,
)
from distopt.scopes.sharing import (
    AUTO_REUSE,
    RegularizationLoss,
    Reuse,
    get_regularization_losses,
    new_variable,
)
from distopt.scopes.steps import Step
from distopt.scopes.variable_scopes import (
    VariableScope,
    get_local_variable,
    get_variable,
    get_variable_scope,
    variable_scope,
)

__all__ = [
    "AUTO_REUSE",
    "Graph",
    "GraphKeys",
    "RegularizationLoss",
    "Reuse",
    "Step",
    "UpdateOp",
    "VariableScope",
    "add_arg_scope",
    "add_to_collection",
    "add_to_collections",
    "arg_scope",
    "arg_scoped_arguments",
    "assert_global_step",
    "control_dependencies",
    "create_global_step",
    "current_arg_scope",
    "ensure_step",
    "get_collection",
    "get_collection_ref",
    "get_default_graph",
    "get_global_step",
    "get_local_variable",
    "get_name_scope",
    "get_or_create_global_step",
    "get_regularization_losses",
    "get_variable",
    "get_variable_scope",
    "global_variables",
    "has_arg_scope",
    "local_variables",
    "model_variables",
    "moving_average_variables",
    "name_scope",
    "new_variable",
    "reset_default_graph",
    "run_update_ops",
    "step",
    "trainable_variables",
    "variable_scope",
]
