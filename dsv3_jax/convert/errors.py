"""What is wrong with the input of a conversion, all of it at once."""

from collections.abc import Iterable

SHOWN = 20


class ConversionError(ValueError):
    """A folder that cannot be read or written; the message lists every problem, the first 20 in full.

    Attributes:
      problems: one line each: what, where, and the value found and expected.
    """

    def __init__(self, title: str, problems: Iterable[str]):
        self.problems = list(dict.fromkeys(problems))
        lines = [f"  {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN} more")
        super().__init__("\n".join([f"{title}:", *lines]))
