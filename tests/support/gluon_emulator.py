"""Runs a warp-specialised Gluon kernel on a machine without a GPU: Triton's interpreter does not know Gluon.

The kernel's Python is executed as it stands, with the few functions it calls replaced by ones of NumPy. Partitions are
threads. What is asynchronous happens late, and in a random order: copies to shared memory by TMA, writes from it, and
reads of operands by the tensor cores (when they are waited for). A buffer is full of NaN from the moment a copy into it is
asked for. So a barrier that is forgotten, of the wrong phase or signalled too early shows in the values, or as a deadlock.
"""

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch

PATIENCE = 20.0
"""Seconds a thread waits before it is a deadlock."""


class Value(np.ndarray):
    """An array, or a number, that also has ``to``."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> "Value":
        return np.asarray(array).view(Value)

    # what a kernel assigns to is a name, not memory
    def __iadd__(self, other: Any) -> Self:  # type: ignore[override,misc]
        return self + other

    def to(self, dtype: Any) -> "Value":
        if not isinstance(dtype, torch.dtype):
            return self
        return _value(torch.from_numpy(np.array(self)).to(dtype).float().numpy())


def _value(x: Any) -> Value:
    return np.asarray(x).view(Value)


class Pointer:
    """An address of an element of a tensor, or an array of them."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + np.asarray(offset))

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.tensor, np.asarray(self.offset)[index])

    def load(self) -> Value:
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        flat = self.tensor.as_strided((size,), (1,), 0).numpy()
        return _value(flat[np.asarray(self.offset) + self.tensor.storage_offset()])

    def store(self, value: Any, mask: Any) -> None:
        flat = self.tensor.flatten()
        offset, value, mask = np.broadcast_arrays(self.offset, value, mask)
        where = torch.from_numpy(offset[mask] + self.tensor.storage_offset())
        flat[where] = torch.from_numpy(value[mask]).to(flat.dtype)


class Shared:
    """Shared memory: a tile, a barrier, or as many as the first dimension says."""

    def __init__(self, shape: list[int]):
        self.shape = shape
        self.data = np.full(shape, np.nan, np.float32)
        self.parts: list[Shared] = [Shared(shape[1:]) for _ in range(shape[0])] if len(shape) > 1 else []
        self.fenced = True
        # of a barrier: arrivals that complete a phase, those missing, bytes missing, phases completed
        self.count, self.missing, self.bytes, self.phase = 0, 0, 0, 0

    def index(self, i: Any) -> "Shared":
        assert 0 <= int(i) < len(self.parts)
        return self.parts[int(i)]

    def permute(self, order: tuple[int, ...]) -> "Transposed":
        assert tuple(order) == (1, 0)
        return Transposed(self)

    def store(self, value: Any) -> None:
        assert value.shape == tuple(self.shape)
        self.data, self.fenced = np.array(value), False


class Transposed:
    def __init__(self, tile: Shared):
        self.tile = tile

    @property
    def data(self) -> Any:
        return self.tile.data.T


class Emulator:
    """One program of the grid."""

    def __init__(self, program: int, programs: int, seed: int):
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.changed = threading.Condition()
        self.fetches: list[Callable[[], None]] = []
        self.writes: list[tuple[int, Callable[[], None]]] = []
        """With the thread that asked. They happen when it waits for them, and no sooner."""
        self.tiles: list[Shared] = []
        self.failure: Exception | None = None
        self.done = False

    def until(self, holds: Callable[[], bool], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: holds() or self.failure, PATIENCE):
                raise TimeoutError(f"deadlock: {what}")
            if self.failure:
                raise RuntimeError("another partition failed")

    def signal(self, barrier: Shared, arrivals: int, transferred: int) -> None:
        with self.changed:
            barrier.missing -= arrivals
            barrier.bytes -= transferred
            assert barrier.missing >= 0 and barrier.bytes >= 0, "a barrier got more than it expects"
            if barrier.missing == 0 and barrier.bytes == 0:
                barrier.phase, barrier.missing = barrier.phase + 1, barrier.count
            self.changed.notify_all()

    def engine(self) -> None:
        """Fetches what was asked for, some time, in any order."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.fetches or self.done or self.failure)
                if self.failure or not self.fetches:
                    return
                self.fetches.pop(self.random.randrange(len(self.fetches)))()

    def fetch(self, desc: Any, where: list[Any], barrier: Shared, tile: Shared) -> None:
        tile.data = np.full(tile.shape, np.nan, np.float32)
        row, col = (int(i) for i in where)

        def copy() -> None:
            data = np.zeros(tile.shape, np.float32)
            part = desc.base[row : row + tile.shape[0], col : col + tile.shape[1]].float().numpy()
            data[: part.shape[0], : part.shape[1]] = part
            tile.data = data
            self.signal(barrier, 0, data.size * desc.base.element_size())

        with self.changed:
            self.fetches.append(copy)
            self.changed.notify_all()

    def write(self, desc: Any, where: list[Any], tile: Shared) -> None:
        assert tile.fenced, "want a fence between a store and its copy"
        row, col = (int(i) for i in where)
        assert row >= 0 and col >= 0

        def copy() -> None:
            to = desc.base[row : row + tile.shape[0], col : col + tile.shape[1]]
            to.copy_(torch.from_numpy(tile.data[: to.shape[0], : to.shape[1]]))

        with self.changed:
            self.writes.append((threading.get_ident(), copy))

    def store_wait(self, left: int) -> None:
        assert left == 0
        me = threading.get_ident()
        with self.changed:
            mine = [write for writer, write in self.writes if writer == me]
            self.writes = [(writer, write) for writer, write in self.writes if writer != me]
            for write in mine:
                write()

    def warp_specialize(self, partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1

        def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
            try:
                function(*args)
            except Exception as error:  # noqa: BLE001 - raised again, from the thread that waits for all
                with self.changed:
                    self.failure = self.failure or error
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        engine = threading.Thread(target=run, args=(self.engine, ()))
        for thread in (engine, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        with self.changed:
            self.done = True
            self.changed.notify_all()
        engine.join()
        if self.failure:
            raise self.failure
        assert not self.fetches and not self.writes, "want all copies done before the end"

    def names(self) -> dict[str, Any]:
        """What a kernel's module calls."""

        def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
            self.tiles.append(Shared(list(shape)))
            return self.tiles[-1]

        def init(barrier: Shared, count: int) -> None:
            barrier.count = barrier.missing = count

        def expect(barrier: Shared, count: int) -> None:
            with self.changed:
                barrier.bytes += int(count)
            self.signal(barrier, 1, 0)

        def wait(barrier: Shared, parity: Any) -> None:
            parity = int(parity)
            self.until(lambda: barrier.phase & 1 != parity, f"phase {barrier.phase}, parity {parity}")

        def fence() -> None:
            for tile in itertools.chain.from_iterable(tiles.parts for tiles in self.tiles):
                tile.fenced = True

        def multiply(a: Any, b: Any, acc: Any, *, use_acc: Any, is_async: bool) -> Callable[[], Value]:
            assert is_async
            return lambda: _value(a.data @ b.data + (np.asarray(acc) if use_acc else 0))

        mbarrier = SimpleNamespace(
            init=init, expect=expect, wait=wait, MBarrierLayout=lambda: None,
            arrive=lambda barrier, count: self.signal(barrier, count, 0),
        )  # fmt: skip
        gl = SimpleNamespace(
            program_id=lambda axis: _value(self.program),
            num_programs=lambda axis: self.programs,
            cdiv=lambda x, y: _value(-(-x // y)),
            minimum=lambda x, y: _value(np.minimum(x, y)),
            where=lambda which, x, y: _value(np.where(which, x, y)),
            arange=lambda first, last, layout: _value(np.arange(first, last)),
            zeros=lambda shape, dtype, layout: _value(np.zeros(shape, np.float32)),
            load=lambda pointer: pointer.load(),
            store=lambda pointer, value, mask: pointer.store(value, mask),
            inline_asm_elementwise=lambda asm, constraints, args, **_: args[0],
            allocate_shared_memory=allocate,
            warp_specialize=self.warp_specialize,
            NVMMADistributedLayout=lambda **_: None,
            SliceLayout=lambda *_: None,
            static_range=range,
            int64=None,
            float32=None,
        )
        return {
            "gl": gl,
            "mbarrier": mbarrier,
            "tma": SimpleNamespace(store_wait=self.store_wait),
            "fetch": self.fetch,
            "write": self.write,
            "fence_async_shared": fence,
            "warpgroup_mma": multiply,
            "warpgroup_mma_wait": lambda left, deps: deps[0](),
        }


class EmulatedKernel:
    """Stands in the place of a kernel of ``module``; called with a grid and arguments, it runs it."""

    def __init__(self, module: ModuleType, kernel: Any, seed: int = 0):
        self.module, self.kernel, self.seed = module, kernel, seed
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **settings: Any) -> None:
            self.launches.append({"grid": grid, **settings})
            settings = {name: value for name, value in settings.items() if name.isupper()}
            for program in range(grid[0]):
                with self._replaced(Emulator(program, grid[0], self.seed + program)):
                    self.kernel.fn(*map(_argument, args), **settings)

        return launch

    @contextlib.contextmanager
    def _replaced(self, emulator: Emulator) -> Iterator[None]:
        functions = {name: f.fn for name, f in vars(self.module).items() if hasattr(f, "fn") and hasattr(f, "params")}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**functions, **emulator.names()}.items():
                patch.setattr(self.module, name, value)
            yield


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if hasattr(x, "block_shape"):
        return SimpleNamespace(base=x.base, dtype=x.base.dtype, layout=None)
    return x
