"""The report as text for a bug report and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def as_json(result: dict) -> str:
    """A report, or the whole result, which must hold no NaN."""
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def healthy(report: dict) -> bool:
    """Nothing wrong, failed, crashed or unchecked; a backend that is absent with its reason is healthy."""
    wrong = any(row["state"] in ("wrong", "failed") for row in report.get("rows", ()))
    return not (report.get("failure") or report.get("unchecked") or wrong)


def heading(environment: dict[str, Any]) -> str:
    """A line for each entry of the environment that is known."""
    lines = ((key, _value(value)) for key, value in environment.items())
    return "\n".join(f"{key:<17} {value}" for key, value in lines if value)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return "" if value is None else str(value)


def section(report: dict) -> str:
    """One backend: whether it is available and why not, its table, and what it printed if it failed."""
    reason, *more = report["reason"].splitlines()
    lines = ["", f"{report['backend']}: {reason}{_loaded(report)}", *(f"  {line}" for line in more)]
    if report.get("cpp_autograd") not in (None, "available"):
        lines.append(f"  the C++ autograd is absent, so small calls take longer: {report['cpp_autograd']}")
    for device in dict.fromkeys(row["device"] for row in report.get("rows", ())):
        lines += _table(report, device)
    if report.get("unchecked"):
        lines.append(f"  {report['unchecked']} combinations left unchecked")
    if report.get("failure"):
        lines.append(f"  {report['failure'].upper()} at {report['at'] or 'the end'}")
    if report.get("failure") or report["reason"] != "available":  # a compiler's messages, for example
        lines += [f"  | {line}" for line in report.get("output", "").splitlines()]
    return "\n".join(lines)


def verdict(result: dict) -> str:
    """Whether all is well, and how many combinations are in which state."""
    reports = result["backends"]
    states = Counter(row["state"] for report in reports for row in report.get("rows", ()))
    counted = {state: states[state] for state in ("right", "wrong", "failed")}
    counted["unchecked"] = sum(report.get("unchecked", 0) for report in reports)
    counted["died or stopped"] = sum(bool(report.get("failure")) for report in reports)
    summary = ", ".join(f"{n} {state}" for state, n in counted.items() if n or state == "right")
    return f"\n{'all is well' if result['right'] else 'NOT WELL'}: {summary}"


def _loaded(report: dict) -> str:
    if report["reason"] != "available" or report["load_s"] < 0.5:
        return ""
    return f", {'built and loaded' if report['built'] else 'loaded'} in {report['load_s']:.1f} s"


def _table(report: dict, device: str) -> list[str]:
    copy = report["copy_gb_per_s"].get(device)
    rows = [row for row in report["rows"] if row["device"] == device]
    unserved = Counter(row["note"] for row in rows if row["state"] == "not served")
    return [
        f"  on {device}" + (f", copy {copy:.0f} GB/s" if copy else ""),
        f"  {'op':<31}{'dtype':<9}{'layout':<14}outputs (limit)    gradients (limit)        ms   GB/s  copy",
        *(_line(row) for row in rows if row["state"] != "not served"),
        *(f"  {count} combinations not served: {reason}" for reason, count in unserved.items()),
    ]


def _line(row: dict) -> str:
    cells = f"  {row['op']:<31}{row['dtype']:<9}{row['layout']:<14}"
    for key, limit in zip(("outputs", "gradients"), row["limits"], strict=True):
        cells += f"{'-' if row[key] is None else format(row[key], '.1e'):>7} ({limit:.0e})    "
    if "ms" in row:
        share = "" if row["share_of_copy"] is None else f"{row['share_of_copy']:5.0%}"
        cells += f"{row['ms']:9.3f} {row['gb_per_s']:6.3g} {share}"
    flag = "" if row["state"] == "right" else f"{row['state'].upper()}: "
    return f"{cells} {flag}{row['note']}".rstrip()
