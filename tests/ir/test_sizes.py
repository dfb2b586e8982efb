from torch.fx.experimental.symbolic_shapes import ShapeEnv

from deepfuse.ir.sizes import differ


def test_only_known_sizes_differ():
    assert differ(2, 3) and not differ(3, 3)
    free = ShapeEnv().create_unbacked_symint()
    assert not differ(free, 3) and not differ(3, free) and not differ(free, free + 1)
