from __future__ import annotations

import pytest
import torch

from qwen_vla_core.errors import UserError
from qwen_vla_core.model.device import choose_device


def test_auto_is_the_cpu_in_float32_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == (torch.device("cpu"), torch.float32)


def test_auto_is_cuda_in_bfloat16_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == (torch.device("cuda"), torch.bfloat16)
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)


def test_cuda_without_cuda_and_unknown_names_say_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use auto or cpu"):
        choose_device("cuda")
    with pytest.raises(UserError, match="auto, cpu, cuda"):
        choose_device("tpu")
