"""What DeepSpeed does in fp16 by itself: stage 0 is wrong in silence, so it is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from dengine.supervised.deepspeed import check_precision


def accelerator(precision: str, config: dict[str, Any]) -> Any:
    plugin = SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}])
def test_stage_0_in_fp16_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stage 0 does not scale the loss.*zero_stage: 1"):
        check_precision(accelerator("fp16", config))
    check_precision(accelerator("bf16", config))


def test_other_stages_train_in_fp16() -> None:
    check_precision(accelerator("fp16", {"zero_optimization": {"stage": 1}}))
