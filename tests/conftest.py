"""Shared fixtures: golden arrays of the reference implementations, and a small trained-looking network."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from prefenv.flow import RectifiedFlow
from prefenv.networks import VelocityMLP

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "public"

hypothesis.settings.register_profile(
    "prefenv", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("prefenv")


def pytest_configure(config: pytest.Config) -> None:
    # Networks this small gain nothing from a second thread, and lose tenfold where others use the cores.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """``golden("01_flow_grpo_step")``: its arrays by name; skips the test where the files are not."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"golden numbers are not beside this checkout: no {name}.npz in {GOLDEN}")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture(scope="session")
def tensors(golden):
    """``tensors("03_policy_losses")``: golden arrays as tensors, text left out."""

    def load(name: str) -> dict[str, torch.Tensor]:
        return {k: torch.as_tensor(v) for k, v in golden(name).items() if v.dtype.kind in "fiub"}

    return load


def _small_flow(event_shape=(3,), dtype=torch.float32, seed=0, **options) -> RectifiedFlow:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        field = VelocityMLP(event_shape, **{"width": 16, "blocks": 2, "frequencies": 4, **options})
        torch.nn.init.normal_(field.out.weight, std=0.3)
        torch.nn.init.normal_(field.out.bias, std=0.3)
    return RectifiedFlow(field.to(dtype))


@pytest.fixture(scope="session")
def small_flow():
    """Factory of small networks with an output that is not zero."""
    return _small_flow
