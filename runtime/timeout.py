"""How long processes wait for one another: one number of seconds, of which all their limits are parts."""

LONGEST_S = 1e8
"""Three years. The stores of torch.distributed count in nanoseconds, of which 1e10 s are too many: they give up at once."""


def is_timeout(timeout_s: object) -> bool:
    """Whether processes can wait as long."""
    number = isinstance(timeout_s, int | float) and type(timeout_s) is not bool
    return number and 0 < timeout_s <= LONGEST_S  # type: ignore[operator]


def check_timeout(timeout_s: object) -> None:
    """Whether it is one.

    Raises:
        ValueError: it is no positive number, or too large.
    """
    if not is_timeout(timeout_s):
        raise ValueError(
            f"build: want timeout_s as a number of seconds > 0, at most {LONGEST_S:g}, got {timeout_s!r:.80}"
        )
