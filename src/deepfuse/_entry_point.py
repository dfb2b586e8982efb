"""Shows ``torch.compile`` our backend where deepfuse is not installed: an entry point without a distribution on disk."""

import sys
from typing import Any

NAME, VALUE, GROUP = "deepfuse", "deepfuse.runtime.backend:backend", "torch_dynamo_backends"


class Finder:
    """Part of ``sys.meta_path``; finds no modules, and one distribution after those that are installed."""

    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> list[Any]:
        if getattr(context, "name", None) not in (None, NAME):
            return []
        import deepfuse

        return [_distribution(deepfuse.__version__)]


def register() -> None:
    """Make ``backend="deepfuse"`` known; does nothing the second time."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())  # type: ignore[arg-type]
    registry = sys.modules.get("torch._dynamo.backends.registry")
    if registry is not None and NAME not in registry.list_backends(exclude_tags=()):

        def backend(*args: Any, **kwargs: Any) -> Any:
            from deepfuse.runtime.backend import backend

            return backend(*args, **kwargs)

        # Dynamo looks for entry points once, and may have done so
        registry.register_backend(backend, name=NAME)


def _distribution(version: str) -> Any:
    from importlib.metadata import Distribution

    class Checkout(Distribution):
        def read_text(self, filename: str) -> str | None:
            return {
                "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n",
                "entry_points.txt": f"[{GROUP}]\n{NAME} = {VALUE}\n",
            }.get(filename)

        def locate_file(self, path: Any) -> Any:
            raise FileNotFoundError(path)

    return Checkout()
