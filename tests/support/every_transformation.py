"""One table: what JAX can do to a layer, each row a function (call, arrays) -> (got, expected)."""

import dataclasses
from collections.abc import Callable

import every_mesh
import jax
import numpy as np
import transformed_layer as layer
from jax import export
from transformed_layer import B, D, half_squares, plain


@dataclasses.dataclass(frozen=True)
class Row:
    """A transformation; the order of its derivatives; what is special about its call."""

    name: str
    run: Callable
    order: int = 0
    options: dict = dataclasses.field(default_factory=dict)


def jitted(ask, right=None):
    """A row that asks the call under jit, and the plain call the same, or `right`."""
    return lambda call, arrays: (jax.jit(ask(call))(*arrays), plain(right or ask, call))


# --- jit, vmap, scan, pmap, remat -----------------------------------------------------------------


def disable_jit(call, arrays):
    with jax.disable_jit():
        return layer.both(call)(*arrays), plain(layer.both, call)


def vmap_of(ask, right):
    """What is asked of each example by itself."""
    return lambda call, arrays: (
        jax.jit(jax.vmap(ask(call), (None, 0, 0)))(*arrays),
        plain(right, call),
    )


def scanned(layers, x, step):
    return jax.lax.scan(lambda x, params: (step(x, params), None), x, layers)[0]


def scan_over_layers(call):
    return layer.of_layers(call, scanned)


def pmap(call, arrays):
    """An example a device, the gradients of the parameters summed."""

    def one(params, x, value_mask):
        of_params, of_x = layer.gradient(call)(params, x, value_mask)
        return call(params, x, value_mask), (jax.lax.psum(of_params, "devices"), of_x)

    params, x, value_mask = arrays
    mapped = jax.pmap(one, "devices", in_axes=(None, 0, 0))
    output, (of_params, of_x) = mapped(params, x[:, None], value_mask[:, None])
    got = output[:, 0], (jax.tree.map(lambda a: a[0], of_params), of_x[:, 0])
    return got, plain(layer.both, call)


def remat(policy):
    def ask(call):
        kept = jax.checkpoint(lambda *arrays: call(*arrays), policy=policy)
        return jax.grad(lambda *arrays: half_squares(kept(*arrays)), (0, 1))

    return jitted(ask, layer.gradient)


def named_policy(*names):
    return jax.checkpoint_policies.save_only_these_names(*names)


# --- export ---------------------------------------------------------------------------------------


def shapes_of(call, arrays, sizes):
    """The arrays' shapes, those of x and mask of the letters of `sizes` where it names any."""
    batch, length = B, call.T
    if sizes:
        symbols = dict(zip(sizes.split(", "), export.symbolic_shape(sizes)))
        batch, length = symbols.get("b", B), symbols.get("t", call.T)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays[0])
    x = jax.ShapeDtypeStruct((batch, length, D), arrays[1].dtype)
    return params, x, jax.ShapeDtypeStruct((batch, length), bool)


def exported(call, arrays, sizes="", **options):
    return export.export(jax.jit(call), **options)(*shapes_of(call, arrays, sizes))


def export_forward(sizes, **options):
    def run(call, arrays):
        program = exported(call, arrays, sizes, **options)
        return jax.jit(program.call)(*arrays), plain(layer.forward, call)

    return run


def export_gradient(sizes):
    """The gradient of a program that was written out and read in."""

    def run(call, arrays):
        written = exported(call, arrays, sizes).serialize(vjp_order=1)
        program = export.deserialize(written)
        loss = lambda *arrays: half_squares(program.call(*arrays))
        return jax.jit(jax.grad(loss, (0, 1)))(*arrays), plain(layer.gradient, call)

    return run


def lowered(sizes, platform):
    """Written for a platform that is not here: its shapes are right, it is not run."""

    def run(call, arrays):
        program = exported(call, arrays, sizes, platforms=[platform])
        (result,) = program.out_avals
        batch, length, width = result.shape
        assert (program.platforms, result.dtype) == ((platform,), arrays[1].dtype)
        symbols = [str(size) for size in (batch, length) if not isinstance(size, int)]
        assert ", ".join(symbols) == sizes
        return np.array(width), np.array(D)

    return run


# --- the table ------------------------------------------------------------------------------------

MASKED = {"masked": True}
GROUPED = {"K": 2}
SHARDED = {"masked": True, "K": 2, "use_bias": False}
DROPOUT = {"dropout": 0.3}
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "named": named_policy("flax_mha_context", "flax_mha_residuals"),
}
SINGLE = [
    Row("jit", jitted(layer.both), 1, MASKED),
    Row("disable_jit", disable_jit, 1, MASKED),
    Row("vmap", vmap_of(layer.forward, layer.forward), 0, MASKED),
    Row("vmap_of_grad", vmap_of(layer.gradient, layer.per_example), 1, MASKED | GROUPED),
    Row("scan_over_layers", jitted(scan_over_layers, layer.looped_layers), 1),
    Row("pmap", pmap, 1, MASKED),
    *(Row(f"remat_{name}", remat(policy), 1, MASKED) for name, policy in POLICIES.items()),
    Row("remat_dropout", remat(POLICIES["named"]), 1, DROPOUT),
]
DERIVATIVES = [
    Row("jvp", jitted(layer.jvp), 1),
    Row("jvp_masked", jitted(layer.jvp), 1, MASKED | GROUPED),
    Row("jvp_dropout", jitted(layer.jvp), 1, DROPOUT),
    Row("linearize", jitted(layer.linearize, layer.jvp), 1, MASKED),
    Row("linear_transpose", jitted(layer.transposed_tangent, layer.gradient), 1, MASKED),
    Row("jvp_of_one_kernel", jitted(layer.of_one_kernel), 1, GROUPED),
    Row("jacfwd", jitted(layer.jacfwd), 1),
    Row("forward_over_reverse", jitted(layer.forward_over_reverse), 2),
    Row("reverse_over_forward", jitted(layer.reverse_over_forward, layer.forward_over_reverse), 2),
    Row(
        "reverse_over_reverse",
        jitted(layer.reverse_over_reverse, layer.forward_over_reverse),
        2,
        MASKED | GROUPED,
    ),
    Row("gradient_penalty", jitted(layer.gradient_penalty), 2, MASKED),
    Row("gradient_penalty_dropout", jitted(layer.gradient_penalty), 2, DROPOUT),
    Row("vmap_of_hvp", vmap_of(layer.forward_over_reverse, layer.hvp_per_example), 2, MASKED),
    Row("third_order", jitted(layer.third_order), 3),
]
EXPORT = [
    *(
        Row(f"export[{sizes}]", export_forward(sizes), 0, MASKED)
        for sizes in ("", "b", "t", "b, t")
    ),
    *(Row(f"export_vjp[{sizes}]", export_gradient(sizes), 1, MASKED) for sizes in ("", "b, t")),
    Row("export_three", export_forward("", platforms=["cpu", "cuda", "tpu"]), 0, MASKED),
    *(
        Row(f"lower_{platform}[{sizes}]", lowered(sizes, platform), 0, MASKED)
        for platform in ("tpu", "cuda")
        for sizes in ("", "b, t")
    ),
]
MESHES = [
    *(
        Row(f"{kind}_{what}", every_mesh.on_mesh(what, kind == "explicit"), 1, options)
        for kind in ("auto", "explicit")
        for what, options in (("batch", MASKED), ("heads", MASKED), ("both", MASKED | GROUPED))
    ),
    Row("auto_both_dropout", every_mesh.on_mesh("both", False), 1, DROPOUT),
    Row("explicit_both_dropout", every_mesh.on_mesh("both", True), 1, DROPOUT),
    Row("auto_both_hvp", every_mesh.on_mesh("both", False, layer.forward_over_reverse), 2),
    Row("explicit_both_hvp", every_mesh.on_mesh("both", True, layer.forward_over_reverse), 2),
    Row("explicit_batch_jvp", every_mesh.on_mesh("batch", True, layer.jvp), 1, MASKED),
    Row("explicit_batch_unset", every_mesh.on_mesh("batch", True, is_set=False), 1),
    Row("explicit_batch_eager", every_mesh.eagerly, 1),
]
SHARD_MAP = [
    *(
        Row(f"shard_map_{name}_{what}_vma={check_vma}", make(what, check_vma), order, options)
        for name, make, order in (
            ("forward", every_mesh.shard_map_forward, 0),
            ("grad_outside", every_mesh.gradient_outside, 1),
            ("grad_inside", every_mesh.gradient_inside, 1),
        )
        for what, options in (("batch", MASKED), ("heads", SHARDED), ("both", SHARDED))
        for check_vma in (True, False)
    ),
    Row(
        "shard_map_jvp_vma=True", every_mesh.derivative_inside(layer.of_one_kernel, True), 1, MASKED
    ),
    Row(
        "shard_map_jvp_vma=False",
        every_mesh.derivative_inside(layer.of_one_kernel, False),
        1,
        MASKED,
    ),
    Row("shard_map_of_one_axis", every_mesh.some_axes, 1, MASKED),
    Row("shard_map_bias_vma=True", every_mesh.replicated_bias(True), 1),
    Row("shard_map_bias_vma=False", every_mesh.replicated_bias(False), 1),
]
TABLE = {row.name: row for row in SINGLE + DERIVATIVES + EXPORT + MESHES + SHARD_MAP}


def call_of(row, implementation, T, dtype):
    return layer.Call(implementation, T, dtype, **TABLE[row].options)
