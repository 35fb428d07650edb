"""The CPU kernels, one variant after the other: every one that was built and that this CPU runs."""

import pytest
import torch

from pagoda.ops import cpu


@pytest.fixture(params=cpu.available() or ["reference"])
def kernels(request, monkeypatch):
    """Makes the operations use one variant for the length of a test, without gradients. Value: its module."""
    if request.param == "reference":
        pytest.skip("no CPU kernels were built")
    module = cpu.load(request.param)
    monkeypatch.setattr(cpu, "kernels", module)
    with torch.no_grad():
        yield module


@pytest.fixture
def two_threads():
    """Two threads for a test, and the old number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
