"""What a lint says of an engine for a device that is not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A rule of a device that operations of an engine break.

    Attributes:
        rule: in short.
        strength: who says so: ``vendor``, ``reported`` or ``unofficial``.
        source: where.
        fix: what to do about it.
        count: operations that break it.
        examples: the first of them, with the modules that they came from.
    """

    rule: str
    strength: str
    source: str
    fix: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """What speaks against a device that is not here; what it really does, only the device tells.

    Attributes:
        device: such as ``Neural Engine``.
        findings: by rule.
        risky: operations that break a rule of its vendor, or one that somebody saw at work.
        operations: there are.
    """

    device: str
    findings: tuple[Finding, ...]
    risky: int
    operations: int
