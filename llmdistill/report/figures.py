"""Numbers as people read them: one form for the page, the charts and the terminal."""

import math

MISSING = "–"


def count(value: float | None) -> str:
    """1234567 -> 1,234,567"""
    return MISSING if value is None else f"{value:,.0f}"


def compact(value: float | None) -> str:
    """1234567 -> 1.23 M"""
    return MISSING if value is None else _scaled(value, 1000, ("", " k", " M", " G", " T"))


def size(num_bytes: float | None) -> str:
    """8400000 -> 8.40 MB (powers of 1,000, as disks and downloads are sold)"""
    return MISSING if num_bytes is None else _scaled(num_bytes, 1000, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < base * 0.9995:
            return f"{significant(value)}{unit}"
        value /= base
    return f"{significant(value)}{units[-1]}"


def significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent; whole numbers stay whole."""
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, decimals)}f}"


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}%"


def interval(low_high: list[float] | tuple[float, float] | None) -> str:
    return MISSING if low_high is None else f"{100 * low_high[0]:.1f}–{100 * low_high[1]:.1f}%"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{significant(value)} ms"


def duration(seconds: float | None) -> str:
    """0.21 s, 41 s, 3 min 12 s, 1 h 32 min"""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds >= 0.005 else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def dollars(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"${value:,.2f}" if value == 0 or value >= 0.01 else f"${value:.4f}"


def probability(value: float | None) -> str:
    """A p value: three decimals are all that anyone should read into it."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
