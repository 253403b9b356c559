"""What the plugin expects of a symbol of SGLang."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Symbol:
    """A dotted path below `sglang.srt.` and what is expected of it.

    parameters: exact parameter names of a callable, separated by spaces. attributes: names that a class has, as
    fields, methods or `self.name = ...`. mentions: texts that its source contains (the calls that reach us).
    since, before: where the releases that are served differ, the first one that it holds for, and the first that it does not.
    """

    path: str
    why: str
    parameters: str | None = None
    attributes: str = ""
    mentions: tuple[str, ...] = field(default=())
    since: str = ""
    before: str = ""
