"""One `pallas_call`: operands, outputs and scratch by name, a tile's place told once for all."""

from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_mha.attention.pallas_tpu.operands import STRETCHES, At, scalars_of, spec
from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.core.errors import fail
from flax_mha.core.typing import Array
from flax_mha.core.varying import shaped_like, varying_alike, varying_axes

VMEM_BYTES = 64 << 20  # of 128 MiB on v5e and v6e, 64 MiB on v5p; libtpu gives 16 unless asked


def launch(
    plan: Plan,
    kernel: Callable[[Plan, dict[str, Any]], None],
    *,
    name: str,
    operands: dict[str, Array],
    outputs: dict[str, Any],
    grid: tuple[Any, ...],
    sequential: int,
    at: Callable[..., At],
    scratch: dict[str, Any],
    output_specs: dict[str, pl.BlockSpec] | None = None,
    output_at: Callable[..., At] | None = None,
) -> list[Array]:
    """Runs `kernel(plan, refs)` over the grid, whose last `sequential` axes go one by one."""
    operands = varying_alike(operands)
    if plan.interpret and varying_axes(operands["query"]):
        rule = "Pallas's interpreter knows no axes that arrays vary over."
        remedy = "Pass `check_vma=False` to `jax.shard_map`, or name another implementation."
        evidence = f"arrays that vary over {sorted(varying_axes(operands['query']))}"
        fail(NotImplementedError, rule, evidence, remedy)
    scalar_names = scalars_of(operands)
    scalars = [operands[n].reshape(-1) for n in scalar_names]
    inputs = list(_inputs(plan, operands, at))
    specs = output_specs or {n: spec(plan, n, x.shape, output_at or at) for n, x in outputs.items()}
    names = (*scalar_names, *(n for n, _, _ in inputs), *outputs, *scratch)

    def body(*refs: Any) -> None:
        kernel(plan, dict(zip(names, refs)))

    semantics: Any = ["parallel"] * (len(grid) - sequential) + ["arbitrary"] * sequential
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[x for _, _, x in inputs],
            out_specs=[specs[n] for n in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shaped_like(operands["query"], x.shape, x.dtype) for x in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=plan.interpret,
        name=name,
    )
    results: list[Array] = call(*scalars, *(x for _, x, _ in inputs))
    return results


def _inputs(plan: Plan, operands: dict[str, Array], at: Callable[..., At]) -> Any:
    """(name, array, block) of each operand that is no scalar; the distances stand there twice."""
    for name, x in operands.items():
        if name in scalars_of(operands):
            continue
        if name == "distances":
            for d in range(STRETCHES):
                yield f"{name}{d}", x, spec(plan, name, x.shape, at, stretch=d)
        else:
            yield name, x, spec(plan, name, x.shape, at)
