"""The one kind of error that the data pipeline raises for what a user gave it."""

from typing import Any

Problem = tuple[str, Any, str]  # (dotted field, its value, what to do about it)


class DataError(ValueError):
    """Text, a tokenizer or a setting that can't be used.

    `field` is the dotted name in the configuration, `value` what it holds and `fix` what to do.
    """

    def __init__(self, field: str, value: Any, fix: str):
        super().__init__(f"{field} = {value!r}: {fix}")
        self.field, self.value, self.fix = field, value, fix

    @property
    def problem(self) -> Problem:
        return self.field, self.value, self.fix
