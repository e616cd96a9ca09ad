"""What a compiled kernel may use and execute at most, by Triton's version and architecture.

The limits (`compile_limits.json`) are what `fastclip.bench.compile_report --renew` measured and 5 %
more. Where a unit of the multiprocessor needs more than 0.35 of the cycles
of the tile's product (0.4 for the sigmoid), the row says why that is left.
"""

import json
import math
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text

FILE = Path(__file__).with_name("compile_limits.json")
COUNTED = ("instructions", "shuffles", "barriers", "loads", "spills")
UNITS = ("issue", "exchange", "special")
RESERVE = 1.05
MOST_OF_PRODUCT = {"sigmoid_kernel": 0.4}
REASON, FAILS = "why", "fails"

Row = dict[str, Any]
"""Instructions of an inside tile's epilogue by kind; `floor`, the largest share of the product's
cycles that a unit needs for them; `spilled`, bytes of local memory; `why` of what is above the aim.
Of what a version of Triton is known not to compile `fails` stands instead.
"""


def exceeded(report: Row, limits: dict[str, Row] | None = None) -> list[str]:
    """What of a report, as JSON has it, is above its limits, a line each.

    Args:
        report: of `compile_report.Report`.
        limits: by kernel and variant; those of this Triton's version and the report's architecture
            if None.
    """
    limits = limits_of(report["triton"], report["architecture"]) if limits is None else limits
    measured = measurement(report)
    name = name_of(report)
    where = f"sm_{report['architecture']} {name}, Triton {report['triton']}"
    allowed = limits.get(name)
    if allowed is None:
        if report["limited"] and report["epilogue"] is not None:
            return [f"{where}: no limits; `compile_report --renew` measures them"]
        allowed = {"spilled": 0}
    return [
        f"{where}: {unit} {measured[unit]} above {limit}"
        for unit, limit in allowed.items()
        if unit in measured and measured[unit] > limit
    ]


def known_to_fail(version: str, architecture: int, name: str) -> bool:
    """Whether the table has it that this version of Triton does not compile a kernel's variant."""
    return FAILS in limits_of(version, architecture).get(name, {})


def measurement(report: Row) -> Row:
    """The figures of a report that limits are kept for."""
    found: Row = {"spilled": report["spills"]}
    if (epilogue := report["epilogue"]) is not None:
        found |= {unit: epilogue[unit] for unit in COUNTED}
        floor = max(epilogue[unit] for unit in UNITS) / report["product"]
        found["floor"] = round(floor, 3)
    return found


def name_of(report: Row) -> str:
    """A kernel and its variant, as the table has them."""
    return f"{report['kernel']} {report['variant']}"


def limits_of(version: str, architecture: int) -> dict[str, Row]:
    """Limits by kernel and variant.

    Those of the newest version of Triton hold for all but where an older one has rows of its own.
    """
    table = read()
    newest, *older = sorted(table, key=_numbers, reverse=True)
    found = dict(table[newest][f"sm_{architecture}"])
    if _minor(version) in older:
        found |= table[_minor(version)].get(f"sm_{architecture}", {})
    return found


def read() -> dict[str, dict[str, dict[str, Row]]]:
    """The table: version, architecture, kernel with its variant."""
    table: dict[str, dict[str, dict[str, Row]]] = json.loads(FILE.read_text())["limits"]
    return table


def renew(reports: list[Row]) -> None:
    """Write what was measured into the table; of an older version only what exceeds the newest's.

    Reasons stay.
    """
    table = read()
    version = _minor(reports[0]["triton"])
    newest = max([*table, version], key=_numbers)
    before = table.get(version, {})
    measured = {f"sm_{report['architecture']}" for report in reports}
    table[version] = {name: rows for name, rows in before.items() if name not in measured}
    for architecture in measured:
        failing = {n: r for n, r in before.get(architecture, {}).items() if FAILS in r}
        if failing:
            table[version][architecture] = failing
    for report in reports:
        architecture, name = f"sm_{report['architecture']}", name_of(report)
        found = measurement(report)
        plain = report["epilogue"] is None and not found["spilled"]
        if plain or (version != newest and not exceeded(report, table[newest][architecture])):
            continue
        aim = aim_of(name)
        row = {unit: _with_reserve(unit, value, aim) for unit, value in found.items()}
        reason = before.get(architecture, {}).get(name, {}).get(REASON)
        row |= {REASON: reason} if reason else {}
        table[version].setdefault(architecture, {})[name] = row
    write_text(FILE, format_table(table))


def format_table(table: dict[str, dict[str, dict[str, Row]]]) -> str:
    """As JSON, a line for each kernel's variant."""
    about = json.loads(FILE.read_text())["about"]
    lines = ["{", f' "about": {json.dumps(about)},', ' "limits": {']
    for version in sorted(table, key=_numbers, reverse=True):
        lines.append(f'  "{version}": {{')
        for architecture, rows in table[version].items():
            lines.append(f'   "{architecture}": {{')
            lines += [f"    {json.dumps(name)}: {json.dumps(row)}," for name, row in rows.items()]
            lines[-1] = lines[-1].rstrip(",")
            lines.append("   },")
        lines[-1] = lines[-1].rstrip(",")
        lines.append("  },")
    lines[-1] = "  }"
    return "\n".join([*lines, " }", "}"]) + "\n"


def aim_of(name: str) -> float:
    """The share of the product's cycles that no unit should need more of."""
    return MOST_OF_PRODUCT.get(name.split()[0], 0.35)


def _with_reserve(unit: str, value: float, aim: float) -> float:
    if unit == "floor":
        limit = math.ceil(100 * RESERVE * value) / 100
        return min(limit, aim) if value <= aim else limit
    if unit in ("spills", "spilled"):
        return value
    return math.ceil(RESERVE * value) + (unit != "instructions") * 2


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
