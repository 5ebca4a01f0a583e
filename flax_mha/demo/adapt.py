"""Another text for a language model: adapters of its attention learn it, its parameters stay.

    logits = model(bytes; params, adapters)      the gradient is that of the adapters alone

Afterwards held-out bytes of the text are judged three times: without adapters, with them beside the
parameters, and with them merged into the parameters, which is one function in two ways.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from flax_mha import Lora
from flax_mha.core.typing import Array, PRNGKey
from flax_mha.demo import adapters, evaluate, train
from flax_mha.demo.adapters import Adapter
from flax_mha.demo.directory import RunDirectory
from flax_mha.demo.run import opened
from flax_mha.demo.settings import DemoError, TrainSettings
from flax_mha.demo.tasks.contract import Batch, count_parameters
from flax_mha.demo.tasks.language import Language
from flax_mha.demo.terminal import Screen


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the command line asks for.

    Attributes:
        data: the text.
        steps: how many, as `learning_rate` and `seed` of the training.
        rank: of every adapter.
        alpha: what they add is multiplied by alpha / rank; None = twice the rank.
        which: the projections that get one; None = all that the layers have.
        name: what the adapters are called; None = as the text.
        overwrite: replace adapters of that name.
    """

    data: Path
    steps: int
    learning_rate: float
    seed: int
    rank: int
    alpha: float | None
    which: Sequence[str] | None
    name: str | None
    overwrite: bool


class State(NamedTuple):
    """What a step takes and returns; the parameters are not in it."""

    lora: Any
    optimizer: Any


def adapt(path: Path, wishes: Wishes) -> None:
    """Trains adapters for a finished run, prints what came of it, and saves them in the run."""
    run, name = RunDirectory(path), wishes.name or adapters.name_for(wishes.data)
    task = _task(run, wishes)
    adapters.check_free(run, name, wishes.overwrite)
    _, params, screen = opened(path)
    rule = _rule(task, wishes)
    screen.say(task.about())
    started = time.perf_counter()
    adapter = Adapter(rule, task.settings, _learn(task, params, rule, screen))
    seconds = time.perf_counter() - started
    results = _judge(task, params, adapter, screen)
    size = adapters.save(run, name, params, adapter, results)
    screen.say(_summary(params, adapter, seconds))
    screen.say(f"Adapters: {run.adapters / name}/, {size:,} bytes of files.")
    screen.say(f"Use them: {run.command('generate')} --adapter {name}")


def _task(run: RunDirectory, wishes: Wishes) -> Language:
    """The run's task with another text; all that the text can be refused for comes first."""
    settings = run.read_settings()
    adapters.check_language(run, settings)
    if not run.is_finished:
        rule = f"{run.path} is not finished: adapters would not fit what it goes on to"
        raise DemoError(f"{rule}. First: {run.resume_command}")
    data = dataclasses.replace(settings.data, file=str(wishes.data.absolute()))
    learned = {name: getattr(wishes, name) for name in ("steps", "learning_rate", "seed")}
    own = dataclasses.replace(settings.train, **learned)
    task = Language(dataclasses.replace(settings, data=data, train=own))
    _check_text(task)
    return task


def _check_text(task: Language) -> None:
    """Enough for one window, and something held out."""
    window, split = task.settings.model.context + 1, task.split
    if len(split.train) < window:
        size = len(split.train) + len(split.held_out)
        rule = f"{split.source} is too short: {len(split.train)} bytes to learn from, of {size}"
        raise DemoError(f"{rule}, hold no window of {window}. Use a longer file.")


def _rule(task: Language, wishes: Wishes) -> Lora:
    which = wishes.which or task.settings.attention.projections
    return Lora(wishes.rank, 2 * wishes.rank if wishes.alpha is None else wishes.alpha, which)


def _learn(task: Language, params: Any, rule: Lora, screen: Screen) -> Any:
    """The trained adapters; a bar shows the way there."""
    settings = task.settings.train
    init_key, dropout_key = jax.random.split(jax.random.key(settings.seed))
    lora = adapters.initial(task, rule, init_key)
    optimizer = _optimizer(settings)
    state = State(lora, optimizer.init(lora))
    update = jax.jit(functools.partial(_step, task, rule, optimizer), donate_argnums=0)
    since, done = time.perf_counter(), 0
    with screen.bar(task.unit) as bar:
        row = bar.add_task("compiling", total=settings.steps, speed=0.0)
        for step, batch in zip(range(1, settings.steps + 1), task.batches(0)):
            step_key = jax.random.fold_in(dropout_key, step)
            state, nats = update(state, params, batch, step_key)
            if step % settings.log_every == 0 or step == settings.steps:
                bits = task.measures(float(nats))["bits_per_byte"]
                speed = (step - done) * task.units_a_step / (time.perf_counter() - since)
                text = f"{bits:.3f} bits per byte"
                bar.update(row, completed=step, description=text, speed=speed)
                since, done = time.perf_counter(), step
    return jax.device_get(state.lora)


def _optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """Clipped Adam: an adapter that decays is a smaller rank, and the base does not decay."""
    adam = optax.adam(train.learning_rate(settings), b2=settings.beta2)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adam)


def _step(
    task: Language,
    rule: Lora,
    optimizer: optax.GradientTransformation,
    state: State,
    params: Any,
    batch: Batch,
    dropout_key: PRNGKey,
) -> tuple[State, Array]:
    model = task.model.clone(lora=rule)

    def objective(lora: Any) -> tuple[Array, Array]:
        return train.loss(task, model, {"params": params, "lora": lora}, batch, dropout_key)

    grads, nats = jax.grad(objective, has_aux=True)(state.lora)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.lora)
    return State(optax.apply_updates(state.lora, updates), optimizer_state), nats


def _judge(task: Language, params: Any, adapter: Adapter, screen: Screen) -> dict[str, float]:
    """Bits per byte of the held-out text; prints them."""
    text, context = task.split.held_out, task.settings.model.context
    adapted = task.model.clone(lora=adapter.rule)
    merged = adapters.merged(task, params, adapter)
    results = {
        "base": evaluate.bits_per_byte(task.model, params, text, context),
        "adapted": evaluate.bits_per_byte(adapted, params, text, context, adapter.arrays),
        "merged": evaluate.bits_per_byte(task.model, merged, text, context),
    }
    rows = [[name, f"{bits:.3f}"] for name, bits in results.items()]
    columns = ["", f"last {len(text):,} bytes"]
    screen.table("Held-out text, bits per byte", columns, rows)
    if not all(map(math.isfinite, results.values())):
        remedy = "Nothing was saved. Try a smaller --learning-rate, or a smaller --alpha"
        raise DemoError(f"the training of the adapters diverged. {remedy}.")
    return results


def _summary(params: Any, adapter: Adapter, seconds: float) -> str:
    trained, kept = count_parameters(adapter.arrays), count_parameters(params)
    share, steps = trained / (trained + kept), adapter.settings.train.steps
    counts = f"{trained:,} of {trained + kept:,} parameters, {share:.1%}"
    return f"Trained {counts}, by {steps:,} steps in {seconds:.0f} seconds."
