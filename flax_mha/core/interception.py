"""qwix's interception: it replaces products while a wrapped model runs, and cannot see a layer's.

It looks for a product's kernel among the arrays of the module that runs. Those of this layer reach
their products through a compiled function, so a rule that matches would change nothing, in silence:
no adapter, no int8. Where a rule matches it says so itself, to authors of modules.
"""

import sys

from flax_mha.core import checks

# The one hook that qwix replaces for authors of modules; of version 0.1.
_HOOK = ("qwix._src.qconfig", "get_current_rule")


def refuse_interception() -> None:
    """Refuses a call for which a rule of qwix is meant; what is not imported intercepts nothing."""
    module, name = _HOOK
    get_current_rule = getattr(sys.modules.get(module), name, None)
    rule = None if get_current_rule is None else get_current_rule("einsum")
    if rule is not None:
        told = "qwix's interception does not reach the kernels of this layer."
        remedy = (
            "Leave it out of the rule's `module_path`, and use `flax_mha.quantize_params` or "
            "`lora=flax_mha.Lora(...)`: `python -m flax_mha guide quantization`."
        )
        evidence = f"a rule for module_path={getattr(rule, 'module_path', None)!r}"
        checks.fail(NotImplementedError, told, evidence, remedy)
