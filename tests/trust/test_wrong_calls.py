"""Wrong calls of every public function: refused by name, before anything is computed.

A sample runs by default; all of them, some 10,000, are slow. What is wrong by the rules of a kind
and harmless here is listed with its reason: an acceptance that is not, and a refusal that is, fail.
"""

import collections
import fnmatch
import re

import good_attention
import good_by_hand
import good_calls
import good_frameworks
import good_objects
import good_readers
import good_writers
import pytest
import wrong_calls
from docstring_rules import public_names

from flax_mha.__main__ import main as overview
from flax_mha.bench.cli import main as bench
from flax_mha.demo.cli import main as demo

MODULES = (
    good_calls,
    good_attention,
    good_objects,
    good_frameworks,
    good_by_hand,
    good_readers,
    good_writers,
)
TABLES = {
    name: table
    for module in MODULES
    for name, table in vars(module).items()
    if isinstance(table, list) and table and isinstance(table[0], wrong_calls.Good)
}
GOODS = {good.name: good for table in TABLES.values() for good in table}
SAMPLED = 101  # one in so many by default
ACCEPTED = {
    "*([qvk][!_]*[ye]_mask: a rank less)": "one mask for all examples",
    "*(segment_ids: B?: a rank less)": "the same ids for all examples",
    "*(positions: B?: a rank less)": "the same positions for all examples",
    "*attention*(mask: a rank less)": "a mask [N, T, S] is all examples'",
    "*.attention_fn(bias: a rank less)": "a bias [N, T, S] is all examples'",
    "*dot_product_attention(bias: a rank less)": "a bias [N, T, S] is all examples'",
    "explain([mb]*: a rank less)": "a mask or a bias [N, T, S] is all examples'",
    "*(query_rows: nested list)": "NumPy reads it",
    "*_initializer: None)": "Keras's layer takes it too: zeros",
    "config.from_keras_config(config: name=*)": "a name has no meaning here",
    "Latent(norm: None)": "no norm",
    "config of a latent dict(norm: None)": "no norm",
    "Mask.[cpt][ara]*: nested list)": "NumPy reads it",
    "Mask.[cpsd][aer]*: a rank less)": "one for all examples",
    "Mask.*: B *)": "the size of a batch shows in the call alone",
    "Mask.window(*: None)": "no bound on that side",
    "*.constraints.*(axis: None)": "Keras: all axes",
    "init_cross_cache(params: query.kernel one more)": "a cache reads no query kernel",
    "init_cross_cache(params: query.kernel empty)": "a cache reads no query kernel",
    "*(local_window_size: with None)": "no bound on that side",
    "[def]*(precision: a tuple)": "JAX takes one for each operand",
    "jax_nn.dot_product_attention(scale: traced)": "it goes into the query",
    "flax.attention_fn([qkv]*: dtype int32)": "Flax's dtype= casts",
    "flax.attention_fn([qkv]*: dtype bool)": "Flax's dtype= casts",
    "flax.attention_fn(mask: dtype *float*)": "Flax's own helpers make masks of 0.0 and 1.0",
    "context_parallel_attention(strategy: None)": "chooses",
    "DistanceBias.check(query_offset: *rank*)": "one offset, or [B] of any shape",
    "decoding(cache: None)": "a call without a cache",
    "Mask.causal(query_offset: two ranks more)": "offsets [B] are flattened",
    "apply_constraints(params: an array)": "a tree without a kernel",
    "apply_constraints(params: *None)": "a tree without a kernel",
    "explain(platform: None)": "this machine's",
    "mask_from_torch(*: dtype *float*)": "PyTorch adds floats to the logits",
    "mask_from_torch(attn_mask: a rank less)": "[T, S] of all examples",
    "*.LongRopeScaling(factors: with a half)": "factors are floats",
    "save_adapter of a layer(scale: 7)": "one number",
    "initializers.*(fans: with a half)": "fans may be fractions",
    "regularizers.L*(x: * rank*)": "a sum over any axes",
    "constraints.*(w: *rank*more)": "the axes are there",
    "constraints.NonNeg()(w: a rank less)": "each number for itself",
    "Rotary*(position_b?: dtype float32)": "it turns by any number",
}


def expected(wrong):
    """The pattern that lists a call as accepted."""
    return next((x for x in ACCEPTED if fnmatch.fnmatch(wrong.name, x)), None)


def mistake(wrong, outcome):
    """What is wrong with what became of a call."""
    if outcome.fault:
        return outcome.fault
    listed = expected(wrong) is not None
    if listed != (outcome.kind == "accepted"):
        return "is listed as accepted, and was refused" if listed else "was accepted"
    return ""


# Functions of a tree alone, which is compared with no config: its structure cannot be wrong there.
ALONE = [
    "quantize_params",
    "dequantize_params",
    "regularization_loss",
    "apply_constraints",
    "merge_lora",
    "split_lora",
]
STRUCTURE = (
    "a dict|beside another|cut|empty|missing|misspelt|a rank less|a rank more|one more|'params'"
)


def is_of_structure(wrong):
    is_alone = wrong.good.name in ALONE and wrong.argument in ("params", "tuned")
    return is_alone and re.search(f"({STRUCTURE})$", wrong.damage.what) is not None


def all_wrong():
    found = [wrong for good in GOODS.values() for wrong in wrong_calls.wrong_calls(good)]
    return [wrong for wrong in found if not is_of_structure(wrong)]


def checked(wrongs):
    """The outcomes, all of which are as they should be."""
    outcomes = [(wrong, wrong_calls.outcome(wrong)) for wrong in wrongs]
    faults = [f"{w.name} {text}" for w, found in outcomes if (text := mistake(w, found))]
    assert faults == [], "\n".join(faults)
    return outcomes


@pytest.mark.slow
def test_some_wrong_calls_of_every_function_are_refused_by_name():
    wrongs = [wrong for wrong in all_wrong() if expected(wrong) is None]
    checked(wrongs[::SAMPLED])


@pytest.mark.slow
def test_every_good_call_works():
    for good in GOODS.values():
        good.function(**good.arguments)


@pytest.mark.slow
def test_every_wrong_call_is_refused_by_name():
    outcomes = checked(all_wrong())
    assert len(outcomes) > 2000
    used = {expected(wrong) for wrong, outcome in outcomes if outcome.kind == "accepted"}
    assert used == set(ACCEPTED)
    for title, keys in (
        ("calls of each function", (wrong.good.name for wrong, _ in outcomes)),
        ("outcomes", (outcome.kind for _, outcome in outcomes)),
    ):
        print(f"\n{title}: {len(outcomes)} in all")
        for key, count in collections.Counter(keys).most_common():
            print(f"{count:6} {key}")


COMMANDS = {
    overview: [["masks"], ["--help-me"], ["guide", "maks"], ["explain", "2x8"]],
    bench: [
        ["--set", "raedme"],
        ["--seconds", "x"],
        ["--case", "8x512"],
        ["--case", "axbxcxd F"],
        ["--contenders", "ourz"],
        ["--skip", "everything"],
        ["--skpi", "compile"],
    ],
    demo: [
        [],
        ["trian", "x.toml"],
        ["train"],
        ["train", "x.toml", "--virtual-devices", "0"],
        ["train", "x.toml", "--process", "2/2"],
        ["train", "x.toml", "--coordinator", "nowhere"],
        ["adapt", "run"],
        ["adapt", "run", "--data", "x", "--rank", "0"],
        ["adapt", "run", "--data", "x", "--alpha", "nan"],
        ["adapt", "run", "--data", "x", "--name", "../up"],
        ["generate", "run", "--temperature", "0"],
        ["generate", "run", "--top-k", "-1"],
        ["generate", "run", "--cache", "int9"],
        ["generate", "run", "--seed", "1.5"],
        ["generate", "run", "--bytes", "9" * 5000],
    ],
}


def test_command_lines_that_make_no_sense_end_with_2_and_say_why(capsys):
    for main, lines in COMMANDS.items():
        for words in lines:
            try:
                code = main(words)
            except SystemExit as end:
                code = end.code
            told = capsys.readouterr().err
            assert code == 2, (words, code, told)
            assert "error:" in told, (words, told)


def test_every_public_function_has_a_good_call():
    """But for readers of files, whose wrong calls are wrong files, and bases without a body."""
    tested = {getattr(good.function, "__qualname__", "") for good in GOODS.values()}
    named = {word for good in GOODS.values() for word in good.name.replace("()", "").split(".")}
    lacking = {
        public.name
        for public in public_names()
        if public.owner is None and public.name.rpartition(".")[2] not in tested | named
    }
    assert lacking == ELSEWHERE


# Files are damaged in test_wrong_files; results, bases and classes without fields have no arguments
# of their own.
ELSEWHERE = {
    f"flax_mha.{module}{name}"
    for module, names in {
        "": "Activations BlockMask CrossCache",
        "attention.": "Residuals",
        "interop.huggingface.": "AttentionAdapter AttentionLayer AttentionList AttentionRecord"
        " list_attention load_adapter load_attention",
        "interop.keras.": "KerasLayer list_keras_layers load_attention load_keras_file"
        " read_keras_arrays",
        "interop.torch.": "load_safetensors",
        "keras.constraints.": "Constraint",
        "keras.initializers.": "Initializer",
        "keras.regularizers.": "Regularizer",
        "norms.": "Norm",
        "positions.": "DenseBias DistanceFunction PositionFunction Scaling Score",
    }.items()
    for name in names.split()
}
