"""The subprocess of `qjax.testing.ptxas_reports`: compiles exported functions for a described GPU.

Usage: python -m qjax.testing._ptxas_worker FOLDER COUNT CAPABILITY, where FOLDER holds 0.export, 1.export, ...
Mosaic GPU writes ptxas' output to stdout; a separator follows each function's.
"""

import sys
from pathlib import Path

import jax
import jax.experimental.mosaic.gpu  # loads the runtime library that compiled kernels link against
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qjax.testing.ptxas import SEPARATOR

# Of each compute capability: name, SMs, shared memory of an SM and the most of a block, in KiB, threads of an SM.
GPUS = {
    "8.0": ("NVIDIA A100-SXM4-80GB", 108, 164, 163, 2048),
    "8.6": ("NVIDIA A10", 72, 100, 99, 1536),
    "8.9": ("NVIDIA L4", 58, 100, 99, 1536),
    "9.0": ("NVIDIA H200", 132, 228, 227, 2048),
}


def target_config(capability: str) -> str:
    """The text of an xla.gpu.GpuTargetConfigProto; what is the same for all does not reach ptxas."""
    name, sms, shared_kib, block_kib, threads = GPUS[capability]
    major, minor = capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_kib * 1024}
  threads_per_core_limit: {threads}
  core_count: {sms}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150121545728
  shared_memory_per_block_optin: {block_kib * 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def main(folder: str, count: int, capability: str) -> None:
    """Compiles each exported function."""
    topology = topologies.get_topology_desc(
        "gpu", platform="cuda", target_config=target_config(capability), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    for i in range(count):
        exported = jax.export.deserialize(bytearray(Path(folder, f"{i}.export").read_bytes()))
        args = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in exported.in_avals
        ]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            args, kwargs = jax.tree.unflatten(exported.in_tree, args)
            jax.jit(exported.call).lower(*args, **kwargs).compile()
        sys.stdout.write(SEPARATOR)
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
