"""The link that the cost model is told of."""

import pytest

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.parallel import Parallel
from deepfuse.ir.device import CPU, H100
from deepfuse.ir.link import INFINIBAND_400, LOOPBACK, ROCE_200
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.expert_link import expert_link
from deepfuse.runtime.processes import Processes


def processes(**settings):
    return Processes(axes=Axes(expert=Axis("expert", "0", 64, 0)), parallel=Parallel(**settings))


def test_the_link_is_the_named_one_or_the_usual():
    assert expert_link(Processes(), CPU) is None
    assert expert_link(processes(), CPU) is LOOPBACK
    assert expert_link(processes(), H100) is INFINIBAND_400, "more processes than a machine has GPUs"
    assert expert_link(processes(link=ROCE_200), H100) is ROCE_200
    assert expert_link(processes(link=ROCE_200, overlap="none"), H100) is None, "nothing is to be hidden"


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"want overlap out of \['auto', 'none', 'shared', 'halves'\], got 'all'"):
        Parallel(overlap="all").check()
    with pytest.raises(ValueError, match="want overlap 'auto' with chunks = 2, got 'halves'"):
        Parallel(chunks=2, overlap="halves").check()
