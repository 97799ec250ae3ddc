"""Joining the group of processes that torchrun has started."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pnanalysis.curvature import processes
from pnanalysis.curvature.processes import join
from pnanalysis.errors import CurvatureError


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1000")
    with pytest.raises(CurvatureError, match="CUDA devices for more processes; lower --nproc-per-node"):
        join(torch.device("cuda"))


@pytest.mark.parametrize("has_group", [False, True])
def test_a_group_is_made_where_there_is_none(has_group: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: has_group)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: made.append(backend))
    monkeypatch.setattr(processes, "_begin_to_beat", lambda: made.append("signs of life"))
    assert join(torch.device("cpu")) == torch.device("cpu")
    assert made == ([] if has_group else ["gloo", "signs of life"])
