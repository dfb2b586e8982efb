import pytest
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from deepfuse.ir.sizes import differ, known_size


def test_only_known_sizes_differ():
    assert differ(2, 3) and not differ(3, 3)
    free = ShapeEnv().create_unbacked_symint()
    assert not differ(free, 3) and not differ(3, free) and not differ(free, free + 1)


def test_what_depends_on_data_is_not_known_and_a_fault_is_no_such_thing():
    free = ShapeEnv().create_unbacked_symint()
    assert known_size(lambda: 3 * 4) == 12
    assert str(known_size(lambda: free * 2)) == f"2*{free}"
    assert known_size(lambda: max(free, 3)) is None
    with pytest.raises(RuntimeError, match="^a fault$"):
        known_size(lambda: (_ for _ in ()).throw(RuntimeError("a fault")))
