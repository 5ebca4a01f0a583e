"""Learning: one compiled step, and the loop around it.

loss = cross entropy of the next byte + whatever losses the attention layers sow.
AdamW with linear warmup and cosine decay; the layers' constraints hold after every step.
"""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mha import constrain
from flax_mha._typing import Array, PRNGKey
from flax_mha.demo import tasks
from flax_mha.demo.model import Transformer
from flax_mha.demo.settings import DemoError, Settings, TrainSettings


class State(NamedTuple):
    """What a step takes and returns."""

    params: Any
    optimizer: Any
    dropout_key: PRNGKey


class Progress(NamedTuple):
    """Where the training stands after a step that is reported."""

    step: int
    loss: float  # nats per byte, the mean since the last report
    learning_rate: float
    tokens_per_second: float
    params: Any

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)


def make_model(settings: Settings) -> Transformer:
    """The model that the settings describe, not yet initialised."""
    return Transformer(settings.model, settings.attention)


def fit(model: Transformer, settings: Settings, text: np.ndarray) -> Iterator[Progress]:
    """Trains on random windows of `text`; yields every `log_every` steps, and at the last."""
    train = settings.train
    init_key, dropout_key = jax.random.split(jax.random.key(train.seed))
    optimizer = make_optimizer(settings)
    params = model.init(init_key, _some_tokens(settings))["params"]
    state = State(params, optimizer.init(params), dropout_key)
    step_function = functools.partial(_step, model, optimizer)
    compiled = jax.jit(step_function, donate_argnums=0)
    batches = tasks.windows(text, settings.model.context + 1, train.batch_size, train.seed)
    losses, started = [], time.perf_counter()
    for step, batch in zip(range(1, train.steps + 1), batches):
        state, loss = compiled(state, batch)
        losses.append(loss)
        if step % train.log_every == 0 or step == train.steps:
            mean = float(np.mean(jax.device_get(losses)))
            seconds = time.perf_counter() - started
            tokens = len(losses) * train.batch_size * settings.model.context
            rate = float(learning_rate(train)(step - 1))
            yield Progress(step, mean, rate, tokens / seconds, state.params)
            losses, started = [], time.perf_counter()


def learning_rate(train: TrainSettings) -> optax.Schedule:
    """Linear warmup, for half the steps at most, then half a cosine down to a fiftieth."""
    peak, warmup = train.learning_rate, min(train.warmup_steps, train.steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, train.steps, peak / 50)


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Clipped AdamW that decays kernels alone; the layers' constraints come last."""
    train, attention = settings.train, settings.attention
    adamw = optax.adamw(
        learning_rate(train), b2=train.beta2, weight_decay=train.weight_decay, mask=_kernels
    )
    constraints = []
    if attention.kernel_constraint is not None or attention.bias_constraint is not None:
        paths = [(f"block_{i}", "attention") for i in range(settings.model.layers)]
        constraints = [constrain(attention, path) for path in paths]
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), adamw, *constraints)


def check_model(model: Transformer, settings: Settings) -> None:
    """Traces model and loss without computing, so that what the layer refuses is said at once."""

    def init_and_loss() -> Array:
        params = model.init(jax.random.key(0), _some_tokens(settings))["params"]
        tokens_BT = jnp.zeros((settings.train.batch_size, settings.model.context + 1), jnp.uint8)
        return _loss(params, model, tokens_BT, jax.random.key(0))[0]

    try:
        jax.eval_shape(init_and_loss)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise DemoError(f"[attention] {error}") from error


def count_parameters(params: Any) -> int:
    """The number of trained numbers."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _step(
    model: Transformer, optimizer: optax.GradientTransformation, state: State, tokens_BT: Array
) -> tuple[State, Array]:
    dropout_key, next_key = jax.random.split(state.dropout_key)
    gradient = jax.grad(_loss, has_aux=True)
    grads, nats = gradient(state.params, model, tokens_BT, dropout_key)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, optimizer_state, next_key), nats


def _loss(
    params: Any, model: Transformer, tokens_BT: Array, dropout_key: PRNGKey
) -> tuple[Array, Array]:
    """What is minimised, and the cross entropy in it."""
    tokens_BT = tokens_BT.astype(jnp.int32)
    logits_BTY, sown = model.apply(
        {"params": params},
        tokens_BT[:, :-1],
        training=True,
        rngs={"dropout": dropout_key},
        mutable=["losses"],
    )
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTY, tokens_BT[:, 1:])
    nats = nats_BT.mean()
    return nats + sum(jnp.sum(loss) for loss in jax.tree.leaves(sown)), nats


def _some_tokens(settings: Settings) -> Array:
    return jnp.zeros((1, settings.model.context), jnp.int32)


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
