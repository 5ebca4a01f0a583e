"""The set `accelerator`: attention of arrays; on a CPU refused, or rehearsed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import run
from helpers import assert_close

from flax_mha import dot_product_attention
from flax_mha.bench import cli
from flax_mha.bench.accelerator import cases, contenders, measure, textbook
from flax_mha.bench.accelerator.cases import Case

pytestmark = [
    pytest.mark.usefixtures("peers_promote"),
    pytest.mark.filterwarnings("ignore"),  # torch and Keras warn when imported
]
SET = ["--set", "accelerator"]
SMALL = "2x12x2x8"


def slow(variant):
    return pytest.param(variant, marks=pytest.mark.slow)


def test_a_label_is_the_text_of_its_case():
    for case in (*cases.CASES, *cases.REHEARSAL):
        assert Case.parse(case.label) == case
    labels = [case.label for case in cases.CASES]
    assert len(set(labels)) == len(labels)
    assert {case.length for case in cases.CASES} == {512, 2048, 8192, 32768}
    for word in ("float32", "bfloat16", "causal", "window=", "dropout=", "bias", "F ", "FB "):
        assert any(word in label for label in labels)
    assert any("causal" not in label for label in labels)


@pytest.mark.parametrize("variant", ["", "causal", "window=3", "causal window=3", "window=99"])
def test_operations_are_those_of_the_pairs(variant):
    forward, backward = (Case.parse(f"{SMALL} {mode} {variant}") for mode in ("F", "FB"))
    matrix = contenders.matrix(forward)
    pairs = 144 if matrix is None else int(matrix.sum())
    assert forward.flops == 4 * 2 * 2 * 8 * pairs
    assert backward.flops == 3.5 * forward.flops


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        "FB window=5 bias",
        *map(slow, ["F", "F causal window=3 bias", "FB causal", "FB causal window=9 bias"]),
    ],
)
def test_the_textbook_is_the_equation(variant, monkeypatch):
    """Blocks of 4 queries, so that there are some."""
    monkeypatch.setattr(textbook, "_MOST", 4)
    case = Case.parse(f"{SMALL} float32 {variant}")
    data = textbook.make_data(case)
    bias = data.arrays[3] if case.bias else jnp.zeros((1, 1, 1))
    mask = contenders.matrix(case)

    def loss(query, key, value, bias):
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8) + bias
        weights = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf))
        context = jnp.einsum("bnts,bsnh->btnh", weights, value)
        return (context * data.probe_BTNH).sum(), context

    arguments = (*data.arrays[:3], bias)
    expected = textbook.expect(case, data).results
    if case.gradient:
        slopes, _ = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arguments)
        for actual, slope in zip(expected, slopes):
            assert_close(actual, slope, "float32")
    else:
        assert_close(expected[0], loss(*arguments)[1], "float32")


VARIANTS = {
    "F float32": {},
    "FB float32 causal bias": {},
    "FB causal window=4": {},
    "F float32 dropout=0.2": {"jax.nn xla": "has no dropout", "keras": "has no dropout"},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [x if "bias" in x else slow(x) for x in VARIANTS])
def test_every_contender_computes_the_textbook_s_numbers(variant):
    size = "8x64x4x8" if "dropout" in variant else SMALL
    found = measure.measure(
        Case.parse(f"{size} {variant}"), tuple(contenders.CONTENDERS), seconds=0.0, rounds=1
    )
    refused = {
        "ours/cudnn": "it is for NVIDIA GPUs, which",
        "ours/pallas_tpu": "is a kernel for TPU",
        "ours/pallas_interpreted": "for tests",
        "jax.nn cudnn": "cuDNN is not detected",
    }
    if "dropout" in variant:
        refused["jax.nn cudnn"] = "has no dropout"
    for row in found.rows:
        if reason := (refused | VARIANTS[variant]).get(row.name):
            assert row.status == "unserved"
            assert reason in row.reason
        elif row.status == "absent":
            assert (
                row.reason
                == f"not installed: pip install {contenders.CONTENDERS[row.name].package}"
            )
        else:
            assert (row.status, row.reason) == ("ok", "")
            assert len(row.samples) == 1
            if "float32" in variant and "dropout" not in variant:
                assert row.error < 1e-5


@pytest.mark.slow
def test_a_rehearsal_prints_its_tables_and_leaves_its_file(tmp_path, capsys, monkeypatch):
    absent = contenders.Source(None, "no_such_package", "torch")
    monkeypatch.setitem(contenders.CONTENDERS, "torch sdpa", absent)
    label = f"{SMALL} FB float32 causal window=3"
    arguments = ["--rehearse", "--case", label, "--contenders", "linen,ours,ours/cudnn,torch sdpa"]
    code, found = run(tmp_path, *SET, *arguments)
    assert code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"device: {jax.devices()[0].device_kind}, one of 8")
    assert found["environment"]["card"]["device"] == jax.devices()[0].device_kind
    assert found["environment"]["command"].startswith("python -m flax_mha.bench --set accelerator")
    (case,) = found["cases"]
    statuses = {row["name"]: row["status"] for row in case["contenders"]}
    assert list(statuses.values()) == ["ok", "ok", "unserved", "absent"]
    linen, ours = case["contenders"][:2]
    assert len(ours["samples"]) == len(linen["samples"]) == 2
    assert f"{linen['median'] / ours['median']:.2f}" in printed
    assert "torch sdpa: absent: not installed: pip install no_such_package" in printed
    refusal = (
        "ours/cudnn: unserved: implementation='cudnn' cannot serve this call: it is for NVIDIA"
    )
    assert refusal in printed


def stub(attend):
    return contenders.Source(lambda case: attend, "jax", "jax")


def raises(error):
    def attend(*_):
        raise error

    return attend


def wrong(query, key, value, bias, dropout_key):
    return 1.1 * dot_product_attention(query, key, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attend", "status", "reason", "code"),
    [
        (
            raises(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 68719476736 bytes\nmore")),
            "out of memory", "RESOURCE_EXHAUSTED: no 68719476736 bytes", 0,
        ),
        (
            raises(RuntimeError("CUDA out of memory. Tried to allocate 64.00 GiB")),
            "out of memory", "CUDA out of memory. Tried to allocate 64.00 GiB", 0,
        ),
        (
            raises(jax.errors.JaxRuntimeError("INTERNAL: no execution plans\nmore")),
            "failed", "INTERNAL: no execution plans", 0,
        ),
        (raises(ValueError("no such window")), "unserved", "no such window", 0),
        (wrong, "wrong", "its numbers are wrong: error 0.1, at most 1e-04 is rounding", 1),
    ],
)  # fmt: skip
def test_what_cannot_be_timed_has_its_reason(
    tmp_path, capsys, monkeypatch, attend, status, reason, code
):
    monkeypatch.setitem(contenders.CONTENDERS, "linen", stub(attend))
    arguments = ["--rehearse", "--case", f"{SMALL} F float32", "--contenders", "ours,linen"]
    exit_code, found = run(tmp_path, *SET, *arguments)
    assert exit_code == code
    ours, linen = found["cases"][0]["contenders"]
    assert ours["status"] == "ok"
    assert (linen["status"], linen["reason"], linen["samples"]) == (status, reason, [])
    printed = capsys.readouterr().out
    assert f"linen: {status}: {reason}" in printed
    assert ("WRONG, and not timed: linen" in printed) == (status == "wrong")


@pytest.mark.slow
def test_what_fails_is_told_by_the_exit_code_where_it_is_ours(tmp_path, capsys, monkeypatch):
    attend = raises(jax.errors.JaxRuntimeError("INTERNAL: bad"))
    failing = contenders.CONTENDERS["ours"]._replace(build=lambda case: attend)
    monkeypatch.setitem(contenders.CONTENDERS, "ours", failing)
    arguments = ["--rehearse", "--case", f"{SMALL} F float32", "--contenders", "ours,linen"]
    exit_code, found = run(tmp_path, *SET, *arguments)
    assert exit_code == 1
    assert [row["status"] for row in found["cases"][0]["contenders"]] == ["failed", "ok"]
    assert "FAILED, and not timed: ours in" in capsys.readouterr().out


@pytest.mark.slow
def test_data_that_do_not_fit(monkeypatch):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
    monkeypatch.setattr(measure, "expect", raises(full))
    found = measure.measure(Case.parse(f"{SMALL} F"), ("ours", "linen"), 0.0, 1)
    told = "of what it is checked against: RESOURCE_EXHAUSTED: no room"
    assert {(row.status, row.reason) for row in found.rows} == {("out of memory", told)}


def test_a_mistake_of_ours_is_not_a_refusal(monkeypatch):
    source = contenders.CONTENDERS["ours"]._replace(build=lambda case: raises(ValueError("a bug")))
    monkeypatch.setitem(contenders.CONTENDERS, "ours", source)
    with pytest.raises(ValueError, match="a bug"):
        measure.measure(Case.parse(f"{SMALL} F"), ("ours",), 0.0, 1)


@pytest.mark.slow
def test_another_dropout_rate_is_wrong(monkeypatch):
    def attend(query, key, value, bias, dropout_key):
        call = dict(dropout_rate=0.8, dropout_key=dropout_key)
        return dot_product_attention(query, key, value, **call)

    monkeypatch.setitem(contenders.CONTENDERS, "linen", stub(attend))
    (row,) = measure.measure(Case.parse("8x64x4x8 F dropout=0.2"), ("linen",), 0.0, 1).rows
    assert row.status == "wrong"
    assert "its dropout moves the output by" in row.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "for a GPU or a TPU, and JAX runs on the CPU here. Install a JAX for yours"),
        (["--rehearse", "--case", "2x5x21 F"], "A case must begin with BxTxNxH"),
        (["--rehearse", "--case", f"{SMALL} FBB"], "After the size a case may have: F, FB, causal"),
        (["--rehearse", "--case", f"{SMALL} dropout=2"], "After the size a case may have"),
        (["--contenders", "ours,tensorflow"], "no contender 'tensorflow'. There are: ours, ours/"),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path, capsys, arguments, message):
    code, found = run(tmp_path, *SET, *arguments)
    errors = capsys.readouterr().err
    assert (code, found) == (2, None)
    assert errors.startswith("error: ")
    assert message in errors


def test_an_option_of_the_layers_is_not_ignored(capsys):
    with pytest.raises(SystemExit):
        cli.main([*SET, "--compiles", "3"])
    assert "unrecognized arguments: --compiles 3" in capsys.readouterr().err
