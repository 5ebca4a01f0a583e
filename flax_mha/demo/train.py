"""Learning: one compiled step, whatever the task.

loss = the task's cross entropy + whatever losses the attention layers sow.
AdamW with linear warmup and cosine decay; the layers' constraints hold after every step.

A step depends on the state before it, on the batch of its number and on its number alone: training
can stop after any step and go on from there, with the same numbers.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from flax_mha import constrain
from flax_mha.core.typing import Array
from flax_mha.demo.mesh import cut_batch, layout, make_mesh, on_mesh, place
from flax_mha.demo.settings import DemoError, MeshSettings, TrainSettings
from flax_mha.demo.tasks.contract import Batch, Task


class State(NamedTuple):
    """What a step takes and returns, and what a checkpoint holds."""

    params: Any
    optimizer: Any
    losses: Array  # cross entropies of the last `log_every` steps, step i in slot i % log_every


def initial_state(task: Task) -> State:
    """The state before the first step; the seed decides."""
    init_key, _ = _keys(task)
    # Compiled: op by op it takes seconds.
    params = jax.jit(task.model.init)(init_key, *task.inputs(task.example()))["params"]
    losses = jnp.zeros(task.settings.train.log_every)
    return State(params, make_optimizer(task).init(params), losses)


def fit(
    task: Task, state: State, done: int = 0, mesh: Mesh | None = None
) -> Iterator[tuple[int, State]]:
    """Goes on after `done` steps; yields the number and the state of every step.

    The state lies on the mesh, by default that of one device, as `mesh.layout` says.
    """
    mesh = make_mesh(MeshSettings()) if mesh is None else mesh
    shardings = layout(mesh, task, state)
    step_function = functools.partial(_step, on_mesh(task), make_optimizer(task))
    compiled = jax.jit(step_function, donate_argnums=0, out_shardings=shardings)
    state = place(state, shardings)
    steps = range(done + 1, task.settings.train.steps + 1)
    for step, batch in zip(steps, task.batches(done)):
        with jax.set_mesh(mesh):
            state = compiled(state, cut_batch(mesh, batch), np.int32(step))
        yield step, state


def recent_loss(state: State, step: int) -> float:
    """The mean cross entropy since the last record, at a step that is recorded."""
    losses = np.asarray(jax.device_get(state.losses))
    since = step % len(losses) or len(losses)
    return float(np.mean(np.roll(losses, -1)[:since]))


def learning_rate(train: TrainSettings) -> optax.Schedule:
    """Linear warmup, for half the steps at most, then half a cosine down to a fiftieth."""
    peak, warmup = train.learning_rate, min(train.warmup_steps, train.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, train.steps, peak / 50)


def make_optimizer(task: Task) -> optax.GradientTransformation:
    """Clipped AdamW that decays kernels alone; the layers' constraints come last."""
    train, attention = task.settings.train, task.settings.attention
    adamw = optax.adamw(
        learning_rate(train), b2=train.beta2, weight_decay=train.weight_decay, mask=_kernels
    )
    constraints = []
    if attention.kernel_constraint is not None or attention.bias_constraint is not None:
        constraints = [constrain(attention, path) for path in task.attention_paths]
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), adamw, *constraints)


def abstract_state(task: Task, mesh: Mesh | None = None) -> State:
    """Shapes and dtypes of the state: traces the model and its loss without computing anything.

    Raises:
        DemoError: the layer refuses what the settings ask for, on the mesh, if there is one.
    """
    cut = task if mesh is None else on_mesh(task)

    def start_and_step() -> State:
        state = initial_state(task)
        return _step(cut, make_optimizer(task), state, task.example(), jnp.int32(1))

    try:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jax.eval_shape(start_and_step)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise DemoError(f"[attention] {error}") from error


def _keys(task: Task) -> Array:
    """The keys of the parameters and of the dropout."""
    return jax.random.split(jax.random.key(task.settings.train.seed))


def _step(
    task: Task, optimizer: optax.GradientTransformation, state: State, batch: Batch, step: Array
) -> State:
    _, dropout_key = _keys(task)
    objective = lambda params, *data: loss(task, task.model, {"params": params}, *data)  # noqa: E731
    gradient = jax.grad(objective, has_aux=True)
    grads, nats = gradient(state.params, batch, jax.random.fold_in(dropout_key, step))
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    losses = state.losses.at[step % state.losses.size].set(nats)
    return State(params, optimizer_state, losses)


def loss(
    task: Task, model: nn.Module, variables: Any, batch: Batch, dropout_key: Array
) -> tuple[Array, Array]:
    """What is minimised, and the cross entropy in it; the model is the task's, or that adapted."""
    logits, sown = model.apply(
        variables,
        *task.inputs(batch),
        training=True,
        rngs={"dropout": dropout_key},
        mutable=["losses"],
    )
    nats = task.nats(logits, batch)
    return nats + sum(jnp.sum(sown_loss) for sown_loss in jax.tree.leaves(sown)), nats


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
