"""What replaces something of PyTorch's own leaves it as it was."""

import threading

from torch._inductor.codegen.cpp import KernelGroup

from deepfuse.ir.private import _sites_in_code


def test_two_threads_leave_inductor_as_it_was():
    before = KernelGroup.finalize_kernel
    entered, left = threading.Event(), threading.Event()

    def second():
        entered.wait()
        with _sites_in_code():
            left.wait(timeout=5)

    thread = threading.Thread(target=second)
    thread.start()
    with _sites_in_code():
        entered.set()
        thread.join(timeout=0.2)  # it waits, or is inside as well
    left.set()
    thread.join()
    assert KernelGroup.finalize_kernel is before
