"""`python -m flax_mha explain`: a call on a command line, and what `explain` says of it."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

import flax_mha
from flax_mha import Mask
from flax_mha import __main__ as overview
from flax_mha.attention import DistanceBias
from flax_mha.attention.choice import RULE
from flax_mha.commands import explain as command

SHAPE = "2x512x4x16"
QUERY = jax.ShapeDtypeStruct((2, 512, 4, 16), jnp.float32)
KEY = jax.eval_shape(jax.random.key, 0)
IDS, REAL = (jax.ShapeDtypeStruct((2, 512), dtype) for dtype in ("int32", "bool"))
SEGMENTS = Mask(segment_ids=((IDS, IDS),))
PADDING = Mask(query_padding=REAL, key_padding=REAL)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def printed(capsys, *words):
    assert overview.main(["explain", "--platform", "cpu", *words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        overview.main(["explain", *words])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return " ".join(output.err.split())


def flat(text):
    return " ".join(text.split())


def test_the_issues_own_command(capsys):
    words = [
        "explain",
        "--platform",
        "tpu",
        "--shape",
        "8x4096x8x128",
        "--dtype",
        "bfloat16",
        "--causal",
    ]
    assert overview.main(words) == 0
    out = capsys.readouterr().out
    x = jax.ShapeDtypeStruct((8, 4096, 8, 128), jnp.bfloat16)
    told = flax_mha.explain(x, x, x, is_causal=True, platform="tpu")
    for name, line in told.items():
        assert f"{name} {line.partition(', and None')[0]}" in flat(out)
    (runs,) = [name for name, line in told.items() if "None chooses it" in line]
    assert f"None {runs}: {RULE}" in flat(out)
    assert "query, key and value [8, 4096, 8, 128], bfloat16, is_causal=True, on tpu" in flat(out)
    assert "context, 256 MiB" in flat(out)  # 4 x 8 x 4096 x 8 x 128 x 2 bytes
    assert "[B, N, T, S] in float32 would take 4 GiB" in flat(out)


@pytest.mark.parametrize(
    ("words", "call", "shown"),
    [
        ("--window 5,0", dict(local_window_size=(5, 0)), "local_window_size=(5, 0)"),
        ("--window 5", dict(local_window_size=5), "local_window_size=5"),
        ("--window none,3", dict(mask=Mask.window(None, 3)), "local_window_size=(None, 3)"),
        ("--local-window-size 5,0", dict(local_window_size=(5, 0)), "local_window_size=(5, 0)"),
        ("--dropout 0.1", dict(dropout_rate=0.1, dropout_key=KEY), "dropout_rate=0.1"),
        ("--broadcast-dropout", dict(broadcast_dropout=True), "broadcast_dropout=True"),
        ("--bias 1x4x512x512", dict(bias=floats(1, 4, 512, 512)), "bias=[1, 4, 512, 512]"),
        (
            "--distance-bias",
            dict(distance_bias=DistanceBias(floats(4, 1023))),
            "distance_bias=[4, 1023]",
        ),
        ("--sinks", dict(sinks=floats(4)), "sinks=[4]"),
        ("--mask 1x512", dict(mask=jax.ShapeDtypeStruct((1, 512), bool)), "Mask(dense_masks)"),
        ("--segments", dict(mask=SEGMENTS), "mask=Mask(segment_ids)"),
        ("--padding", dict(mask=PADDING), "mask=Mask(query_padding, key_padding)"),
        ("--soft-cap 30", dict(soft_cap=30.0), "soft_cap=30.0"),
        ("--weights", dict(return_weights=True), "return_weights=True"),
        ("--residuals --scale 0", dict(return_residuals=True, scale=0.0), "scale=0.0"),
        ("--block-sizes 64,128", dict(block_sizes=(64, 128)), "block_sizes=(64, 128)"),
        ("--precision highest", dict(precision="highest"), "precision='highest'"),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_option_is_an_argument_of_the_call(capsys, words, call, shown, platform):
    told = flax_mha.explain(QUERY, QUERY, QUERY, platform=platform, **call)
    assert overview.main(["explain", "--platform", platform, "--shape", SHAPE, *words.split()]) == 0
    out = flat(capsys.readouterr().out)
    assert shown in out
    for name, line in told.items():
        assert f"{name} {line.partition(', and None')[0]}" in out


def test_keys_and_values_may_differ_from_the_query(capsys):
    out = flat(
        printed(capsys, *["--shape", "2x8x4x16", "--key-shape", "2x512x2x16", "--value-dim", "24"])
    )
    assert "query [2, 8, 4, 16], key [2, 512, 2, 16], value [2, 512, 2, 24], float32" in out
    # 4-byte numbers: query 1024, key 32768, value 49152, context 1536.
    assert "context, 330 KiB" in out
    assert "would take 128 KiB" in out


def test_nothing_is_wider_than_a_terminal(capsys):
    words = [
        *["--shape", "8x4096x8x128", "--causal", "--weights", "--residuals", "--soft-cap", "30"]
    ]
    words += [
        *[
            "--dropout",
            "0.1",
            "--bias",
            "1x8x4096x4096",
            "--segments",
            "--padding",
            "--window",
            "255,0",
        ]
    ]
    lines = printed(capsys, *words).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    names = [line.split()[0] for line in lines if re.match("  [a-zA-Z]", line)]
    assert names == [*flax_mha.IMPLEMENTATIONS, "None", "memory"]


def test_a_sequence_over_devices_that_are_not_here(capsys):
    words = ["--shape", "2x4096x6x128", "--context-axis", "16,all_gather", "--platform", "tpu"]
    assert overview.main(["explain", *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "all_to_all it gives each of the 16 devices of 'context'" in told
    assert "None ring: the first that can; pallas_tpu: blockwise from T x S" in told


def test_all_arguments_of_the_function_can_be_given():
    """A new argument of `dot_product_attention` needs an option here, or a reason."""
    import inspect

    arguments = set(inspect.signature(flax_mha.dot_product_attention).parameters)
    left_out = {"implementation", "dropout_start"}  # checked to be a name; where a shard begins
    arrays = {"query", "key", "value", "dropout_key"}  # made of the shapes and the rate
    given = {option.argument for option in command.OPTIONS}
    assert given | arrays | left_out == arguments


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: --shape"),
        (["--shape", "2x8x2x8", "--context-axis", "4,rong"], r"4,ring,zigzag\. .*'rong'"),
        (["--shape", "2x8x2x8", "--context-axis", "four"], r"Received: 'four'"),
        (["--shape", "8x4096"], r"four sizes, BxTxNxH such as 8x4096x8x128.* Received: '8x4096'"),
        (["--shape", "8x4096x8x128x2"], r"four sizes, BxTxNxH"),
        (["--shape", "8,4096,8,128"], r"four sizes, BxTxNxH"),
        (["--shape", "8x4096x8xH"], r"four sizes, BxTxNxH"),
        (["--shape", "8x-1x8x4"], r"four sizes, BxTxNxH"),
        (["--shape", SHAPE, "--dtype", "bf16"], "invalid choice: 'bf16'.*bfloat16"),
        (["--shape", SHAPE, "--platform", "cuda"], "invalid choice: 'cuda'.*gpu"),
        (["--shape", SHAPE, "--key-shape", "2x512x3x16"], "multiple of"),
        (["--shape", SHAPE, "--key-shape", "3x512x4x16"], "batch"),
        (["--shape", SHAPE, "--window", "a"], "keys before and after.* Received: 'a'"),
        (["--shape", SHAPE, "--window", "1,2,3"], "keys before and after"),
        (["--shape", SHAPE, "--window=-1,0"], "minimum|at least|negative|>= 0"),
        (["--shape", SHAPE, "--dropout", "1.5"], "dropout_rate"),
        (["--shape", SHAPE, "--bias", "7x512"], "bias"),
        (["--shape", SHAPE, "--bias", "7,512"], r"sizes with x between them.* Received: '7,512'"),
        (["--shape", SHAPE, "--soft-cap", "0"], "soft_cap"),
        (["--shape", SHAPE, "--block-sizes", "64"], r"two sizes.* Received: '64'"),
        (["--shape", SHAPE, "--precision", "3"], "'highest'.* Received: '3'"),
        (["--shape", SHAPE, "--value-dim", "-1"], "one size.* Received: '-1'"),
    ],
)
def test_bad_input_is_the_parsers_error(capsys, words, said):
    assert re.search(said, refused(capsys, *words))


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 40, "1024 GiB")],
)
def test_bytes_are_said_in_units(bytes_, text):
    assert command.size(bytes_) == text


def test_no_two_options_share_a_name():
    flags = [*itertools.chain.from_iterable(option.flags for option in command.OPTIONS)]
    assert len(flags) == len(set(flags))


def test_functions_of_pairs_can_be_asked_for(capsys):
    lines = printed(capsys, "--shape", SHAPE, "--score", "--mask-function", "--platform", "gpu")
    told = " ".join(lines.split())
    assert "score=a function" in told
    assert "mask=Mask(functions)" in told
    assert re.search(r"reference ok.*blockwise ok.*cudnn (?!ok)", told)
