"""A run on a mesh of virtual devices: the numbers of one, on any mesh and from one to another."""

import json

import jax
import numpy as np
import pytest
from demo_helpers import TINY

from flax_mha.demo import cli, mesh, train
from flax_mha.demo.config_file import settings_from
from flax_mha.demo.settings import DemoError, MeshSettings
from flax_mha.demo.tasks import TASKS

STEPS = 6
MESHES = [
    pytest.param("language", (2, 2, 1), id="language-2x2x1"),
    pytest.param("language", (2, 1, 4), id="language-2x1x4"),
    *(
        pytest.param(task, sizes, id=f"{task}-{'x'.join(map(str, sizes))}", marks=pytest.mark.slow)
        for task, sizes in [
            *(("language", sizes) for sizes in [(8, 1, 1), (1, 4, 1), (1, 1, 8), (2, 2, 2)]),
            *(("digits", sizes) for sizes in [(4, 1, 1), (1, 1, 3)]),
            *(("dates", sizes) for sizes in [(2, 2, 1), (1, 2, 2)]),
        ]
    ),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 105, 3000).astype(np.uint8).tobytes())
    return path


@pytest.fixture
def task_on(text):
    """A tiny task with dropout in its layers and in their attention."""

    def task(name, sizes=(1, 1, 1), **tables):
        settings = {**TINY[name], "mesh": dict(zip(mesh.AXES, sizes))}
        settings["attention"] = {"num_heads": 4, "dropout": 0.2, **tables.get("attention", {})}
        settings["model"] = {**settings["model"], "dropout": 0.2}
        settings["train"] = {**settings["train"], "steps": STEPS, "batch_size": 8, "log_every": 6}
        if name == "language":
            settings["data"] = {"file": str(text)}
        return TASKS[name](settings_from(settings))

    return task


def trained(task):
    """The state after all steps, where it lies."""
    devices = mesh.make_mesh(task.settings.mesh)
    *_, (_, state) = train.fit(task, train.initial_state(task), 0, devices)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), MESHES)
def test_the_losses_are_those_of_one_device(task_on, name, sizes):
    one, many = trained(task_on(name)), trained(task_on(name, sizes))
    assert len(many.losses.sharding.device_set) == np.prod(sizes)
    np.testing.assert_allclose(np.asarray(many.losses), np.asarray(one.losses), rtol=2e-5)
    # The mean gradients: a weight moves by the sign of a gradient even where that is but rounding,
    # as that of the key's bias.
    means = (jax.tree.leaves(state.optimizer[1][0].mu) for state in (many, one))
    for of_many, of_one in zip(*means, strict=True):
        np.testing.assert_allclose(of_many, of_one, atol=1e-7 + 2e-4 * np.abs(of_one).max())


@pytest.mark.slow
def test_another_dropout_mask_would_be_seen(task_on):
    """The losses above agree because the masks do: with another seed they are apart."""
    task = task_on("language")
    tables = task.settings.to_dict()
    tables["train"]["seed"] = 1
    losses = []
    for settings in (task.settings, settings_from(tables)):
        _, state = next(train.fit(TASKS["language"](settings), train.initial_state(task)))
        losses.append(float(state.losses[1]))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_weights_and_moments_are_cut_over_the_heads_and_the_batch_over_data(task_on):
    task = task_on("language", (2, 4, 1))
    devices = mesh.make_mesh(task.settings.mesh)
    state = train.initial_state(task)
    state = mesh.place(state, mesh.layout(devices, task, state))
    found = jax.tree_util.tree_leaves_with_path(state)
    cut = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in found
        if leaf.addressable_shards[0].data.shape != leaf.shape
    }
    # The kernels and biases of query, key and value, and the kernel of the output; two moments.
    assert len(cut) == 3 * 7
    assert all("'attention'" in name for name in cut)
    kernel = state.params["block_0"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 1, 4)
    batch = mesh.cut_batch(devices, np.arange(24).reshape(8, 3))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(4, 3)}


REFUSALS = [
    ({"data": 16}, r"mesh.data must divide train.batch_size. .*= 16, .*= 8"),
    ({"heads": 8}, r"mesh.heads must divide attention.num_heads. .*= 8, .*= 4"),
    ({"data": 0}, r"mesh.data must be a number of at least 1. Received: 0"),
    ({"dat": 2}, r"unknown key of \[mesh\].*'dat'. Did you mean 'data'\?"),
]


@pytest.mark.parametrize(("table", "message"), REFUSALS)
def test_refusals(table, message):
    tables = {**TINY["digits"], "attention": {"num_heads": 4}, "mesh": table}
    with pytest.raises(DemoError, match=message):
        mesh.check_mesh(settings_from(tables))


def test_more_devices_than_there_are():
    message = r"must not exceed the devices. Received: 4 data x 2 heads x 2 context = 16, and 8"
    with pytest.raises(DemoError, match=message):
        mesh.make_mesh(MeshSettings(4, 2, 2))


def test_what_the_layer_refuses_on_a_mesh_is_told_before_anything_is_written(run_of, capsys):
    run = run_of("digits")
    changes = ["--set=mesh.context=2", "--set=attention.implementation=cudnn"]
    assert cli.main(run.train("--no-plots", *changes)) == 2
    assert "error: [attention] " in capsys.readouterr().err
    assert not run.out.exists()


def curve(run, out):
    return [[row["step"], row["loss"]] for row in run.records("train", out)]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(run_of, capsys, monkeypatch):
    run = run_of("language")
    whole = run.out.with_name("whole")
    sooner = [f"--set=train.{name}=5" for name in ("checkpoint_every", "log_every")]
    changes = [*sooner, "--no-plots", "--steps=20", "--set=model.dropout=0.2"]
    assert cli.main(run.train(*changes, "--out", str(whole))) == 0
    fit = train.fit

    def killed(*arguments):
        for step, state in fit(*arguments):
            if step == 12:
                raise MemoryError("killed")
            yield step, state

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", killed)
        with pytest.raises(MemoryError, match="killed"):
            cli.main(run.train(*changes, "--set=mesh.data=2", "--set=mesh.heads=2"))
    capsys.readouterr()
    assert cli.main(["resume", str(run.out), "--set", "train.steps=9"]) == 2
    assert "only [mesh] may change, as mesh.data=2. Received" in capsys.readouterr().err
    moved = ["--set=mesh.data=1", "--set=mesh.heads=1", "--set=mesh.context=4"]
    assert cli.main(["resume", str(run.out), "--no-plots", *moved]) == 0
    assert "Resuming after step 10 of 20." in capsys.readouterr().out
    settings = json.loads((run.out / "settings.json").read_text())
    assert settings["mesh"] == {"data": 1, "heads": 1, "context": 4}
    np.testing.assert_allclose(curve(run, run.out), curve(run, whole), rtol=1e-4)
    # What looks at a run needs no mesh.
    assert cli.main(["generate", str(run.out), "--bytes", "3"]) == 0
