"""The layer that every transformation is tried on: its arrays, its derivatives, what is expected.

A `Call` is one layer and one call of it. `arrays` are what it is called with, `plain` is the call
that says what is right: the reference in float32, of the same numbers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import TOLERANCES, booleans, normal, random_params

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes

B, N, H, D = 4, 4, 8, 16
# The largest error of an entry, relative to the largest one, by the order of the derivative. In
# 16 bits there is one, that of the project's table.
BY_ORDER = {0: TOLERANCES["float32"], 1: TOLERANCES["float32"], 2: 1e-4, 3: 1e-3}


@dataclasses.dataclass(frozen=True)
class Call:
    """One self-attention of [B, T, D]; hashable, so that what is expected is kept."""

    implementation: str | None = "reference"
    T: int = 16
    dtype: str = "float32"
    masked: bool = False
    causal: bool = True
    B: int = B
    N: int = N
    K: int = N
    H: int = H
    D: int = D
    use_bias: bool = True
    dropout: float = 0.0
    rounded: str = ""

    @property
    def config(self):
        return MultiHeadAttentionConfig(
            self.N,
            self.H,
            num_kv_heads=self.K,
            use_bias=self.use_bias,
            dropout=self.dropout,
            implementation=self.implementation,
            param_dtype=self.dtype,
        )

    @property
    def plain(self):
        """The call that says what is right."""
        rounded = self.rounded or self.dtype
        return dataclasses.replace(
            self, implementation="reference", dtype="float32", rounded=rounded
        )

    @property
    def arrays(self):
        """(params, x, value_mask or None), rounded to the tested dtype."""
        shapes = param_shapes(self.config, (self.B, self.T, self.D))
        params, x = random_params(shapes), normal(1, self.B, self.T, self.D)
        rounded = jax.tree.map(lambda a: a.astype(self.rounded or self.dtype), (params, x))
        value_mask = booleans(2, self.B, self.T) if self.masked else None
        return *jax.tree.map(lambda a: a.astype(self.dtype), rounded), value_mask

    def of_heads(self, parts):
        """The layer of one of `parts` equal groups of heads."""
        return dataclasses.replace(self, N=self.N // parts, K=self.K // parts)

    def __call__(self, params, x, value_mask=None, **call):
        return self.between(params, x, x, x, value_mask, **call)

    def between(self, params, query, value, key, value_mask=None, **call):
        """The call with a query, a value and a key of its own."""
        if self.dropout:
            call["dropout_key"] = jax.random.key(3)
        return multi_head_attention(
            params,
            query,
            value,
            key,
            config=self.config,
            value_mask=value_mask,
            use_causal_mask=self.causal,
            **call,
        )

    def loss(self, params, x, value_mask=None, **call):
        return half_squares(self(params, x, value_mask, **call))


def half_squares(y):
    """A scalar whose derivatives of every order depend on every entry."""
    return 0.5 * (y.astype("float32") ** 2).sum()


def directions(params, x):
    """A tangent of the parameters and of the input."""
    leaves, tree = jax.tree.flatten((params, x))
    tangents = [normal(50 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [t.astype(a.dtype) for t, a in zip(tangents, leaves)])


def inner(a, b):
    """The scalar product of two trees."""
    products = jax.tree.map(lambda x, y: (x.astype("float32") * y.astype("float32")).sum(), a, b)
    return sum(jax.tree.leaves(products))


# --- what is asked of a call: functions of (call) that give functions of its arrays ---------------


def forward(call):
    return call


def gradient(call):
    return jax.grad(call.loss, (0, 1))


def both(call):
    """The output and the gradient, as one program."""
    return lambda *arrays: (call(*arrays), gradient(call)(*arrays))


def jvp(call):
    def run(params, x, *mask):
        function = lambda params, x: call(params, x, *mask)
        return jax.jvp(function, (params, x), directions(params, x))

    return run


def linearize(call):
    def run(params, x, *mask):
        y, tangent_of = jax.linearize(lambda params, x: call(params, x, *mask), params, x)
        return y, tangent_of(*directions(params, x))

    return run


def jacfwd(call):
    """The Jacobian of the output by three scalars: factors of query, value and key."""

    def run(params, x, *mask):
        def function(factors):
            query, value, key = (x * factor for factor in factors.astype(x.dtype))
            return call.between(params, query, value, key, *mask).astype("float32")

        return jax.jacfwd(function)(jnp.ones(3))

    return run


def forward_over_reverse(call):
    """A Hessian-vector product."""

    def run(params, x, *mask):
        function = lambda params, x: gradient(call)(params, x, *mask)
        return jax.jvp(function, (params, x), directions(params, x))[1]

    return run


def reverse_over_forward(call):
    """The same Hessian-vector product."""

    def run(params, x, *mask):
        tangents = directions(params, x)
        loss = lambda params, x: call.loss(params, x, *mask)
        return jax.grad(lambda *at: jax.jvp(loss, at, tangents)[1], (0, 1))(params, x)

    return run


def reverse_over_reverse(call):
    """The same Hessian-vector product."""

    def run(params, x, *mask):
        tangents = directions(params, x)
        slope = lambda params, x: inner(gradient(call)(params, x, *mask), tangents)
        return jax.grad(slope, (0, 1))(params, x)

    return run


def gradient_penalty(call):
    """The gradient of the mean square of the input's gradient."""

    def run(params, x, *mask):
        def penalty(params, x):
            of_x = jax.grad(call.loss, 1)(params, x, *mask)
            return (of_x.astype("float32") ** 2).mean()

        return jax.grad(penalty, (0, 1))(params, x)

    return run


def third_order(call):
    """The gradient of v H v, H the Hessian by the input: reverse over forward over reverse."""

    def run(params, x, *mask):
        _, v = directions(params, x)

        def curvature(params, x):
            of_x = lambda x: jax.grad(call.loss, 1)(params, x, *mask)
            return inner(jax.jvp(of_x, (x,), (v,))[1], v)

        return jax.grad(curvature, (0, 1))(params, x)

    return run


def transposed_tangent(call):
    """The transpose of the linear map that `linearize` gives: the gradient again."""

    def run(params, x, *mask):
        y, tangent_of = jax.linearize(lambda params, x: call(params, x, *mask), params, x)
        return jax.linear_transpose(tangent_of, params, x)(y)

    return run


def of_one_kernel(call):
    """The output's change with one kernel alone: all other tangents are known to be zero."""

    def run(params, x, *mask):
        kernel = params["key"]["kernel"]
        function = lambda kernel: call(
            params | {"key": params["key"] | {"kernel": kernel}}, x, *mask
        )
        return jax.jvp(function, (kernel,), (kernel[::-1],))

    return run


def per_example(call, ask=gradient):
    """What is asked of each example by itself, one after the other."""

    def run(params, *examples):
        return jax.lax.map(lambda example: ask(call)(params, *example), examples)

    return run


def hvp_per_example(call):
    return per_example(call, forward_over_reverse)


def stacked(params):
    """The parameters of three layers, one after the other."""
    return jax.tree.map(lambda a: jnp.stack([a, -a, a[::-1]]), params)


def in_a_loop(layers, x, step):
    for i in range(3):
        x = step(x, jax.tree.map(lambda a, i=i: a[i], layers))
    return x


def of_layers(call, through):
    """Output of three residual layers, and gradient by their parameters and the input."""

    def run(params, x, *mask):
        def output(layers, x):
            return through(layers, x, lambda x, params: x + call(params, x, *mask))

        loss = lambda *at: half_squares(output(*at))
        layers = stacked(params)
        return output(layers, x), jax.grad(loss, (0, 1))(layers, x)

    return run


def looped_layers(call):
    return of_layers(call, in_a_loop)


@functools.cache
def expected(ask, call):
    """What `ask` gives of the plain call, as NumPy arrays."""
    assert call == call.plain, "kept by the plain call"
    return jax.tree.map(np.asarray, jax.jit(ask(call))(*call.arrays))


def plain(ask, call):
    return expected(ask, call.plain)


def assert_equal(got, right, tolerance):
    """The same trees; a leaf's errors are measured by the largest entry of its own dict."""
    assert jax.tree.structure(got) == jax.tree.structure(right)
    leaves = jax.tree_util.tree_leaves_with_path(right)
    largest = {}
    for path, leaf in leaves:
        entry = np.abs(as_float64(leaf)).max()
        largest[path[:-1]] = max(entry, largest.get(path[:-1], 0.0))
    for (path, leaf), ours in zip(leaves, jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path) or "output"
        ours, leaf = as_float64(ours), as_float64(leaf)
        assert ours.shape == leaf.shape, f"{name}: shape {ours.shape}, not {leaf.shape}"
        assert np.isfinite(ours).all(), f"{name}: not finite"
        error = np.abs(ours - leaf).max() / largest[path[:-1]]
        assert error <= tolerance, f"{name}: error {error:.3g} of the largest, not {tolerance:.3g}"


def as_float64(x):
    return np.asarray(x).astype(np.float64)


def tolerance_of(order, dtype):
    return BY_ORDER[order] if dtype == "float32" else TOLERANCES[dtype]
