"""Settings of the whole test run, made before JAX starts a backend and the code under test is imported."""

import os
from importlib.metadata import version

# Eight devices on one CPU, for every test of a mesh. Optimising tiny programs takes LLVM many times longer
# than running them as they are; the arithmetic is IEEE float32 either way.
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
# A quarter of the time of tests that compile a lot; later versions have no such flag.
if version("jaxlib") < "0.11":
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"


def pytest_configure(config):
    wants_gpu = "gpu" in (config.option.markexpr or "").replace("not gpu", "")
    if not wants_gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        given = os.environ.get("XLA_FLAGS", "")
        ours = [f"{name}={value}" for name, value in FLAGS.items() if name not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()

    from hypothesis import settings
    from jaxtyping import install_import_hook

    # Compilation makes the first example of a property take seconds.
    settings.register_profile("compiles", deadline=None, print_blob=True)
    settings.load_profile("compiles")
    # Every array signature is checked, shapes and dtypes, whenever a test calls or traces it.
    arrays = ["losses", "step", "state", "optimizer", "ema", "throughput"]
    packages = ["dsv3_jax.model", "dsv3_jax.parallel", "dsv3_jax.precision", "pallas_kernels"]
    packages += [f"dsv3_jax.training.{name}" for name in arrays]
    packages += ["dsv3_jax.generation", "dsv3_jax.evaluation", "dsv3_jax.serving"]
    install_import_hook(packages, "beartype.beartype")
