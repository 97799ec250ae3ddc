"""The name of the processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from pnanalysis.io import hardware


def test_the_processor_is_named_by_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 1\nmodel name\t: Some  CPU @ 2.00GHz\n")
    monkeypatch.setattr(hardware, "_CPU_INFO", info)
    assert hardware.cpu_name() == "Some CPU @ 2.00GHz"
    for text in ("", "model name\t:\n"):  # as on other processors than x86
        info.write_text(text)
        assert hardware.cpu_name() == (platform.processor() or platform.machine())
    info.unlink()  # as on other systems than Linux
    assert hardware.cpu_name() == (platform.processor() or platform.machine())
