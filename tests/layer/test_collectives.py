"""What devices send each other: counted in the compiled programs, and every mesh's numbers."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_mesh import make_mesh, placed, used
from jax.sharding import NamedSharding, PartitionSpec
from thinning import half
from transformed_layer import Call, assert_equal, both, forward, gradient, plain, tolerance_of

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
MESHES = {"batch": {"data": 8}, "heads": {"model": 8}, "both": {"data": 4, "model": 2}}
EXPLICIT = pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["reference", "blockwise"])
WHAT = pytest.mark.parametrize("what", list(MESHES))
EIGHT = {"N": 8, "K": 8, "B": 8}
# The first is of the size at which three arrays were gathered; the others have several blocks.
CALLS = {
    "16x512x512": {**EIGHT, "T": 512, "B": 16, "D": 512, "H": 64, "causal": False},
    "T=300": {**EIGHT, "T": 300, "causal": False},
    "T=600": {**EIGHT, "T": 600},
    "T=600-grouped": {**EIGHT, "T": 600, "N": 16},
    "T=600-masked": {**EIGHT, "T": 600, "masked": True},
    "T=600-dropout": {**EIGHT, "T": 600, "dropout": 0.3},
}
DEFAULT = {("batch", "T=600", "blockwise", False), ("heads", "T=600", "blockwise", True)}

BY_DEFAULT = (4, "blockwise", True, 300)


def compiled(function, mesh, arrays):
    with used(mesh):
        return jax.jit(function).lower(*arrays).compile()


def collectives(program):
    """How often each kind stands in a compiled program; one that is started and ended, once."""
    text = program.as_text()
    counts = {kind: len(re.findall(rf"\s{kind}(?:-start)?\(", text)) for kind in KINDS}
    return {kind: count for kind, count in counts.items() if count}


def loops_that_wait(program):
    """The bodies of loops in which devices wait for each other, once a step."""
    text = program.as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    blocks = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text)
    names = {re.match(r"(?:ENTRY )?%?([\w.\-]+)", block)[1]: block for block in blocks if block}
    assert bodies <= set(names)
    return [body for body in bodies if re.search(rf"\s(?:{'|'.join(KINDS)})\S*\(", names[body])]


def cases():
    """The size at which arrays were gathered on both kinds of mesh; of the others, in turns."""
    for i, what in enumerate(MESHES):
        for j, size in enumerate(CALLS):
            # The reference has no loop that could gather: one size shows what it sends.
            names = ("reference", "blockwise") if j == 0 else ("blockwise",)
            kinds = (False, True) if j == 0 else ((i + j) % 2 == 1,)
            for implementation, explicit in itertools.product(names, kinds):
                case = (what, size, implementation, explicit)
                name = "-".join((*case[:3], "explicit" if explicit else "auto"))
                marks = () if case in DEFAULT else pytest.mark.slow
                yield pytest.param(*case, marks=marks, id=name)


EVERY_CASE = pytest.mark.parametrize(("what", "size", "implementation", "explicit"), list(cases()))


def on_mesh(what, size, implementation, explicit):
    call, mesh = Call(implementation, **CALLS[size]), make_mesh(MESHES[what], explicit)
    return call, mesh, placed(mesh, call.arrays)


@pytest.mark.slow
@EVERY_CASE
def test_forward(what, size, implementation, explicit):
    """Nothing over the batch; over the heads the sum of their outputs. Sharded as the input.

    With a value_mask the heads may also tell each other, in [B, T] booleans, which rows are finite.
    """
    call, mesh, arrays = on_mesh(what, size, implementation, explicit)
    program = compiled(forward(call), mesh, arrays)
    sums = [{}] if what == "batch" else [{"all-reduce": 1}, {"all-reduce": 1 + call.masked}]
    assert collectives(program) in sums
    assert program.output_shardings.is_equivalent_to(arrays[1].sharding, 3)


@pytest.mark.slow
@EVERY_CASE
def test_gradient(what, size, implementation, explicit):
    """Sums alone: of the weights' gradients over the batch, of the input's over the heads."""
    call, mesh, arrays = on_mesh(what, size, implementation, explicit)
    program = compiled(gradient(call), mesh, arrays)
    assert set(collectives(program)) == {"all-reduce"}
    assert loops_that_wait(program) == []
    for array, sharding in zip(
        jax.tree.leaves(arrays[:2]), jax.tree.leaves(program.output_shardings)
    ):
        assert sharding.is_equivalent_to(array.sharding, array.ndim)


@pytest.mark.slow
@IMPLEMENTATION
def test_arrays_that_only_jit_places(implementation):
    """Under `in_shardings` no type tells of the mesh: it is known when the program is lowered."""
    call, mesh = Call(implementation, **CALLS["T=600"]), make_mesh(MESHES["batch"])
    params, x, _ = call.arrays
    everywhere, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    for function, kinds in ((forward(call), set()), (gradient(call), {"all-reduce"})):
        run = jax.jit(function, in_shardings=(everywhere, rows))
        program = run.lower(params, np.asarray(x)).compile()
        assert set(collectives(program)) == kinds
        assert loops_that_wait(program) == []


def length_sharded(mesh, call):
    """The call's arrays, the length over the devices: each query needs the keys of all others."""
    params, x, _ = call.arrays
    over = NamedSharding(mesh, PartitionSpec(None, "data"))
    return jax.device_put(params, NamedSharding(mesh, PartitionSpec())), jax.device_put(x, over)


@pytest.mark.slow
def test_the_counter_counts():
    """The control: keys that are gathered, a sum over devices, a rotation."""
    mesh, call = make_mesh(MESHES["batch"]), Call("reference", **{**EIGHT, "T": 128})
    program = compiled(forward(call), mesh, length_sharded(mesh, call))
    assert collectives(program).get("all-gather", 0) >= 1
    over = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(jnp.arange(64.0), over)
    assert collectives(compiled(jnp.sum, mesh, (x,))) == {"all-reduce": 1}
    rotate = lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])
    rotated = jax.shard_map(rotate, mesh=mesh, in_specs=over.spec, out_specs=over.spec)
    assert collectives(compiled(rotated, mesh, (x,))) == {"collective-permute": 1}
    assert collectives(compiled(jnp.sin, mesh, (x,))) == {}
    walk = lambda x: jax.lax.fori_loop(0, jnp.int32(x[0]) + 9, lambda _, x: x + x.sum(), x)
    assert len(loops_that_wait(compiled(walk, mesh, (x,)))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "implementation", "explicit", "T"),
    [
        pytest.param(
            data,
            implementation,
            explicit,
            T,
            id=f"{data}x{8 // data}-{implementation}-{'explicit' if explicit else 'auto'}-{T}",
            marks=() if (data, implementation, explicit, T) == BY_DEFAULT else pytest.mark.slow,
        )
        for data, implementation, explicit, T in half(
            (8, 4, 2, 1), ("reference", "blockwise"), (False, True), (600, 300)
        )
    ],
)
def test_every_shape_of_mesh_gives_one_devices_numbers(data, implementation, explicit, T):
    """Outputs and gradients, with dropout: one other bit of its mask is an error of 0.1."""
    call = Call(implementation, **{**EIGHT, "T": T, "masked": True, "dropout": 0.3})
    mesh = make_mesh({"data": data, "model": 8 // data}, explicit)
    with used(mesh):
        got = jax.jit(both(call))(*placed(mesh, call.arrays))
    assert len(got[0].sharding.device_set) == 8
    assert_equal(got, plain(both, call), tolerance_of(1, "float32"))


@EXPLICIT
@IMPLEMENTATION
@pytest.mark.slow
def test_a_sharded_length_is_right(explicit, implementation):
    """It may be gathered."""
    mesh = make_mesh(MESHES["batch"], explicit)
    call = Call(implementation, **{**EIGHT, "T": 600})
    params, x = length_sharded(mesh, call)
    with used(mesh):
        got = jax.jit(both(call))(params, x)
    assert_equal(got, plain(both, call), tolerance_of(1, "float32"))


def test_the_tolerance_sees_another_mask():
    """The control of the meshes' dropout: examples that stand elsewhere get another mask."""
    call = Call("reference", **{**EIGHT, "T": 16, "dropout": 0.3})
    params, x, _ = call.arrays
    kept, dropped = (np.asarray(y) for y in (call(params, x), call(params, x[::-1])[::-1]))
    assert np.abs(kept - dropped).max() > 0.1 * np.abs(kept).max()
