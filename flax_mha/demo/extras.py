"""Packages that the demo needs and the layer does not."""

import importlib.util

from flax_mha.demo.settings import DemoError

_PACKAGES = {"sklearn": "scikit-learn"}


def require(module: str, purpose: str, otherwise: str = "") -> None:
    """Says at the start, not after two minutes, that an optional package is not there.

    Raises:
        DemoError: `module` is not installed.

    Example:
        >>> require("json", "the records")
        >>> require("no_such_module", "the picture", "or pass --no-plots")
        Traceback (most recent call last):
          ...
        flax_mha.demo.settings.DemoError: no_such_module is needed for the picture. \
Run `pip install 'flax_mha[demo]'` (or `pip install no_such_module`), or pass --no-plots.
    """
    if importlib.util.find_spec(module) is None:
        package = _PACKAGES.get(module, module)
        remedy = f"Run `pip install 'flax_mha[demo]'` (or `pip install {package}`)"
        ending = f", {otherwise}" if otherwise else ""
        raise DemoError(f"{package} is needed for {purpose}. {remedy}{ending}.")
