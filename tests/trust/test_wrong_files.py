"""Every reader refuses every damaged file: named, in time, with no error of the inside."""

import collections
import fnmatch
import shutil

import checkpoints
import jax
import pytest
import wrong_files
from checkpoints import CONFIG, PATHS

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

import keras_damage  # noqa: E402

from flax_mha.interop.huggingface import AttentionAdapter, load_attention, save_adapter  # noqa: E402
from flax_mha.params import lora_params  # noqa: E402

SAMPLED = 23  # one in so many by default
NOT_READ = "the field says nothing of attention, and is not read"
# What is read all the same, and why: by file, and then by damage.
ACCEPTED = {
    "config.json vocab_size: *": NOT_READ,
    "config.json rope_theta: 1.5": "another base",
    "config.json rope_theta: 1099511627776": "another base",
    "config.json num_key_value_heads: None": "as many as of queries; the arrays are not read",
    "config.json head_dim: None": "hidden_size / num_attention_heads; the arrays are not read",
    "*.json without its last byte": "that was a newline",
    "small.toml without its last byte": "that was a newline",
    "small.toml cut to 99%": "that was a newline",
    "small.toml cut to 100 bytes": "it has fewer",
    **{
        f"adapter_config.json {name}: *": NOT_READ
        for name in ("task_type", "base_model_name_or_path", "inference_mode", "lora_dropout")
    },
    **{
        f"adapter_config.json {name}: *": "the arrays say which modules, and have biases or none"
        for name in ("bias", "fan_in_fan_out", "target_modules")
    },
    "adapter_config.json lora_alpha: *": "another scale, as PEFT takes it",
    "adapter_config.json ???*_pattern: None": "as without it",
    "adapter_config.json use_rslora: *": "another scale, or as without it",
    "adapter_config.json init_lora_weights: None": "as without it",
}


def archive(folder):
    weights = keras_damage.sound_weights(folder)
    keras_damage.archive(folder / "model.keras", keras_damage.sound_members(weights))
    weights.unlink()


def adapter(folder):
    base = checkpoints.write(folder / "base")
    layer = load_attention(base)[PATHS[0]]
    D = CONFIG["hidden_size"]
    lora = lora_params(jax.random.key(0), layer.config, (1, D), rank=2)
    save_adapter(folder / "saved", {PATHS[0]: AttentionAdapter(lora, 1.0)}, like=base)
    for file in (folder / "saved").iterdir():
        file.rename(folder / file.name)
    (folder / "saved").rmdir()


SOUND = {
    "weights": keras_damage.sound_weights,
    "archive": archive,
    "folder": checkpoints.write,
    "adapter": adapter,
}
READERS = wrong_files.readers(SOUND)


def expected(reader, what):
    """The pattern that lists a damage as harmless."""
    name = f"{reader.file} {what}"
    return next((x for x in ACCEPTED if fnmatch.fnmatchcase(name, x)), None)


def sound_of(reader, folder):
    """The folder with the sound file, which is read, and the names of its damages."""
    sound = folder / "sound"
    sound.mkdir(parents=True)
    reader.make(sound)
    reader.read(sound)
    return sound, [what for what, _ in wrong_files.damages(reader, sound / reader.file)]


def damaged(reader, sound, what):
    """The outcome of one damage to a copy of the sound folder."""
    copy = sound.parent / "here" / "copy"
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(sound, copy)
    dict(wrong_files.damages(reader, copy / reader.file))[what]()
    return wrong_files.outcome(reader, copy, what)


def checked(folder, step=1):
    """(reader, damage, outcome) of one in `step` damages, all of which are as they should be."""
    outcomes, faults = [], []
    for number, reader in enumerate(READERS):
        sound, names = sound_of(reader, folder / str(number))
        for what in names[number % step :: step]:
            found = damaged(reader, sound, what)
            outcomes.append((reader, what, found))
            is_listed = expected(reader, what) is not None
            fault = found.fault or "was accepted"
            if found.fault or (found.kind == "accepted" and not is_listed):
                faults.append(f"{reader.name} of {reader.file} with {what}: {fault}")
    assert faults == [], "\n".join(faults)
    return outcomes


def test_some_damages_of_every_file_are_refused_by_name(tmp_path):
    checked(tmp_path, SAMPLED)


@pytest.mark.slow
def test_every_damaged_file_is_refused_by_name(tmp_path):
    outcomes = checked(tmp_path)
    assert len(outcomes) > 900
    used = {expected(reader, what) for reader, what, x in outcomes if x.kind == "accepted"}
    assert used == set(ACCEPTED)
    kinds = collections.Counter(found.kind for *_, found in outcomes)
    readers = collections.Counter(f"{reader.name} {reader.file}" for reader, *_ in outcomes)
    print(f"\ndamaged files: {len(outcomes)} in all")
    for name, count in [*readers.items(), *kinds.most_common()]:
        print(f"{count:6} {name}")
