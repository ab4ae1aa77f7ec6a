"""What comes of generation: texts, and counts of how they came."""

from dataclasses import dataclass, field


@dataclass
class Statistics:
    """Counts of a generator since it was made. Seconds are of decoding; with `generate` of compiling too."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0  # Sequences times steps.
    accepted: list[int] = field(default_factory=list)  # Drafts accepted, by position.

    def acceptance(self) -> list[float]:
        """The share of accepted drafts, by position."""
        return [count / max(self.steps, 1) for count in self.accepted]

    def summary(self) -> str:
        """One line for a person."""
        speed = self.tokens / max(self.seconds, 1e-9)
        line = f"{self.tokens} tokens in {self.seconds:.2f} s: {speed:.1f} tokens/s"
        if self.accepted:
            rates = ", ".join(f"{rate:.1%}" for rate in self.acceptance())
            line += f"; drafts accepted by position: {rates}"
            line += f"; {self.tokens / max(self.steps, 1):.2f} tokens a step"
        return line


@dataclass(frozen=True)
class Completion:
    """What follows a prompt; the stop token or string is no part of it."""

    tokens: list[int]
    log_probs: list[float]
    text: str  # Empty without a tokenizer.
    finish_reason: str  # "stop", or "length" when the limit of tokens or of the context was reached.
