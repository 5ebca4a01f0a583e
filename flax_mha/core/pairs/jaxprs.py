"""What JAX traces, on every version of it: jaxprs opened, their operations run one by one."""

from typing import Any

INLINED = ("jit", "pjit", "closed_call")  # calls whose insides are steps like any others


def opened(jaxpr: Any) -> tuple[Any, Any]:
    """(the jaxpr itself, its constants), of an open one or a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(primitive: Any, values: Any, params: Any) -> list[Any]:
    """The results of one operation."""
    bound = primitive.get_bind_params(params)
    # JAX before 0.11 hands over functions among the parameters apart.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = primitive.bind(*functions, *values, **params)
    return list(results) if primitive.multiple_results else [results]
