"""The subprocess of `qjax.testing.ptxas_reports`: compiles exported functions for a described H200.

Usage: python -m qjax.testing._ptxas_worker FOLDER COUNT, where FOLDER holds 0.export, 1.export, ...
Mosaic GPU writes ptxas' output to stdout; a separator follows each function's.
"""

import sys
from pathlib import Path

import jax
import jax.experimental.mosaic.gpu  # loads the runtime library that compiled kernels link against
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qjax.testing.ptxas import SEPARATOR

# xla.gpu.GpuTargetConfigProto of an H200 SXM; shared memory and register limits are those of sm_90.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150121545728
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def main(folder: str, count: int) -> None:
    """Compiles each exported function."""
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=H200, topology="1x1x1"
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
    main(sys.argv[1], int(sys.argv[2]))
