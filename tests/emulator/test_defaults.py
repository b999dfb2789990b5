"""What is built unless it is told otherwise is what was measured to be worth it."""

from pathlib import Path

import pytest

from cloud_node.building import plan_of
from cloud_node.emulators import BuildConfig


@pytest.mark.parametrize(
    ("told", "method", "keep"),
    [({}, "rank", 0.75), ({"keep": "0.5"}, "rank", 0.5), ({"method": "quant", "bits": 4}, "quant", None)],
)
def test_three_quarters_of_the_ranks_are_kept_unless_it_is_told_otherwise(
    told: dict[str, object], method: str, keep: float | None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    told |= {"model": str(tiny_models["llama"]), "out": tmp_path / "out"}
    plan = plan_of(BuildConfig.model_validate(told))
    assert (plan.method, plan.keep) == (method, keep)
