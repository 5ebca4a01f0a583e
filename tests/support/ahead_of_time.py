"""Programs compiled for accelerators that this machine does not have.

For TPUs libtpu alone is needed, for an H100 the CUDA plugin and ptxas: a test that uses one is
skipped with what `missing` says. Compiled means that the vendor's compiler took the program; what
it says of memory and cycles is the compiler's account.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Read when libtpu starts, which is at the first topology: where it must not look for chips.
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes at once otherwise abort on a lock file
}.items():
    os.environ.setdefault(name, value)


H100 = "h100"  # a topology of one
# What the compiler asks of a GPU: NVIDIA's figures of an H100 SXM with 80 GB.
H100_FACTS = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 85899345920
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing(topology):
    """Why nothing compiles for it here; None = it does."""
    tpu = "compiling for a TPU needs libtpu: pip install 'flax_mha[tpu-aot]'"
    gpu = "compiling for an H100 needs the CUDA plugin: pip install 'flax_mha[gpu-aot]'"
    if topology != H100:
        return None if importlib.util.find_spec("libtpu") else tpu
    plugins = importlib.util.find_spec("jax_plugins")
    names = [f"jax_plugins.xla_cuda{version}" for version in (12, 13)]
    return None if plugins and any(map(importlib.util.find_spec, names)) else gpu


def devices_of(topology="v5e:2x2"):
    """The chips of a topology, as `jax.devices()` would give them on one."""
    if topology == H100:
        facts = dict(topology="1x1x1", target_config=H100_FACTS)
        return topologies.get_topology_desc(platform="cuda", **facts).devices
    return topologies.get_topology_desc(topology, platform="tpu").devices


def placed(args, topology="v5e:2x2"):
    """Shapes and dtypes of `args`, on one chip; what says where it stands, stays there."""
    mesh = Mesh(np.array(devices_of(topology)[:1]), ("chip",))
    one = NamedSharding(mesh, PartitionSpec())

    def place(x):
        own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own or one)

    return jax.tree.map(place, args)


def compile(function, args, topology="v5e:2x2", **jit):
    """`function(*args)` compiled for the topology; `jit` holds options of `jax.jit`.

    `args` are trees of arrays or of `ShapeDtypeStruct`s. What a mesh of `devices_of(topology)`
    divides carries its sharding: `ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(...))`.
    """
    return jax.jit(function, **jit).lower(*placed(args, topology)).compile()


def beyond_arguments(compiled):
    """Bytes at the peak of a program, its arguments aside."""
    memory = compiled.memory_analysis()
    return memory.peak_memory_in_bytes - memory.argument_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction that a compiled program runs; what fusions hold inside is none."""

    name: str
    opcode: str
    bytes: int  # of its result
    on_chip: bool  # whether that lies in the chip's own memory
    operands: tuple[str, ...]
    cycles: int  # the compiler's estimate; 0 where it gives none, as for copies
    computation: str  # the program's own, or a loop's body


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def steps_of(compiled):
    """The steps of a program and of its loops' bodies, each once, from the text that XLA gives."""
    inside = set(re.findall(r" (?:calls|to_apply)=%?([\w.\-]+)", compiled.as_text()))
    steps, computation = [], None
    for line in compiled.as_text().splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = opened[1]
        step = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)[,\s]?", line)
        if step and computation not in inside:
            shape, names = step[2], re.findall(r"%([\w.\-]+)", step[4])
            given = re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles = int(given[1]) if given else 0
            account = (_bytes(shape), "S(1)" in shape, tuple(names), cycles, computation)
            steps.append(Step(step[1], step[3], *account))
    return steps


def _bytes(shape):
    """Those of the largest array in a result's type."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    sizes = [WIDTHS.get(t, 8) * math.prod(int(n) for n in d.split(",") if n) for t, d in arrays]
    return max(sizes, default=0)
