"""What a check says: how it stands, what was found, what to change."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

GIB = 1 << 30


class Status(StrEnum):
    """How a check came out."""

    ok = "ok"
    warning = "warning"  # the run will go, perhaps not as meant
    error = "error"  # the run will fail, or mean nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    status: Status
    found: str
    advice: str = ""  # empty: nothing to change


def ok(name: str, found: str) -> Finding:
    """Return a green finding."""
    return Finding(name=name, status=Status.ok, found=found)


def warning(name: str, found: str, advice: str) -> Finding:
    """Return a yellow finding."""
    return Finding(name=name, status=Status.warning, found=found, advice=advice)


def error(name: str, found: str, advice: str) -> Finding:
    """Return a red finding."""
    return Finding(name=name, status=Status.error, found=found, advice=advice)


def warnings_of(findings: Sequence[Finding]) -> list[str]:
    """Return the yellow findings as one line each. Raises ValueError for the first red one."""
    for finding in findings:
        if finding.status is Status.error:
            raise ValueError(_line(finding))
    return [_line(finding) for finding in findings if finding.status is Status.warning]


def size(num_bytes: float) -> str:
    """Return a number of bytes in words."""
    unit, name = next((u, n) for u, n in ((GIB, "GiB"), (GIB >> 10, "MiB"), (1, "bytes")) if num_bytes >= u or u == 1)
    return f"{num_bytes / unit:,.1f} {name}" if unit > 1 else f"{num_bytes:,.0f} bytes"


def _line(finding: Finding) -> str:
    return f"{finding.name}: {finding.found}; to change it: {finding.advice}"
