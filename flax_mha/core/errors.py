"""The form of every message: the rule, what was received, what to do."""

from typing import NoReturn


def fail(error: type[Exception], rule: str, evidence: str, remedy: str = "") -> NoReturn:
    """Raises `error` with the three parts that every message of this package has."""
    raise error(" ".join(part for part in (rule, f"Received: {evidence}.", remedy) if part))
