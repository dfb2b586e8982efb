"""Find the pass to blame: the first whose removal makes a failing check pass."""

from collections.abc import Callable, Iterable


def bisect(check: Callable[[str | None], bool], names: Iterable[str]) -> str | None:
    """Leave out one pass after the other, in the order they run.

    A pass may need another one (a fusion what an earlier pass recognised), so that halving the list could blame one
    that merely feeds the culprit.

    Args:
        check: whether all is well without the pass of this name; ``None``: with all passes.

    Returns:
        Its name; ``None`` where no single removal helps.

    Raises:
        ValueError: the check does not fail with all passes.
    """
    if check(None):
        raise ValueError("bisect: want a check that fails with all passes, got one that passes")
    return next((name for name in names if check(name)), None)
