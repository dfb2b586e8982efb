import pytest
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from deepfuse.ir.sizes import check_equal


def _message() -> str:
    return "rows: want 3, got 2"


def test_known_sizes_that_differ_are_a_value_error():
    check_equal(3, 3, _message)
    with pytest.raises(ValueError, match="^rows: want 3, got 2$"):
        check_equal(2, 3, _message)


def test_a_symbol_is_taken_as_equal_from_then_on():
    rows = ShapeEnv().create_unbacked_symint()
    assert not statically_known_true(rows == 3)
    check_equal(rows, 3, _message)
    assert statically_known_true(rows == 3)
