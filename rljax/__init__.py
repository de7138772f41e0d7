"""rljax: reinforcement-learning post-training of language models in JAX.

Importing the package imports no JAX. It only keeps XLA's CPU backend from a known source of wrong numbers.
"""

import os
from importlib import metadata


def _keep_cpu_reductions_right() -> None:
    """Let XLA:CPU hand single dots to YNNPACK but no fused reductions, unless the user chose.

    jaxlib 0.10.2 to 0.11.x fuses a matrix-vector product with a following square and sum wrongly (jax-ml/jax#39103)
    and crashes on some reductions (#39257, #40412). The flag is read when the backend opens and an unknown flag
    aborts the process, hence the version gate.
    """
    try:
        version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:3])
    except (metadata.PackageNotFoundError, ValueError):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    name = "--xla_cpu_experimental_ynn_fusion_type"
    if (0, 10, 2) <= version < (0, 12, 0) and name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}=individual_dot".strip()


_keep_cpu_reductions_right()
