"""What a constructor shows of its arguments."""

import inspect
from collections.abc import Callable
from typing import Any


def arguments_of(other: Any) -> Callable[[Any], Any]:
    """Shows `*args, **fields` of a constructor as the arguments of `other`, written there alone."""

    def shown(init: Any) -> Any:
        parameters = [*inspect.signature(init).parameters.values()]
        self, own = parameters[:1], [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        arguments = inspect.signature(other).parameters.values()
        init.__signature__ = inspect.Signature([*self, *arguments, *own])
        return init

    return shown
