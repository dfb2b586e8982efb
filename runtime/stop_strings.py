"""Text that comes in tokens, cut at stop strings."""

from deepfuse.runtime.tokenizer import Tokenizer


class TextStream:
    """Decodes tokens as they come and holds back what may turn out to be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        if any(not s for s in stop):
            raise ValueError("generate: want stop strings of at least one character, got an empty one")
        self.stop, self.stopped = stop, False
        self._decoder, self._held = tokenizer.stream(), ""

    def push(self, token: int) -> str:
        """The text that is certain after this token."""
        return self._emit(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._emit(self._decoder.flush())
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _emit(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # the first to be complete: the one that begins first would depend on where tokens end
        found = [(begin + len(s), begin) for s in self.stop if (begin := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
