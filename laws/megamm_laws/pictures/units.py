"""Numbers as people read them: units, sensible digits, ticks of logarithmic axes."""

import math
import re

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(value: float) -> str:
    """Parameters or tokens: 941,696 -> 942K, 1.5e9 -> 1.5B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # Three digits of 999.6K would be 1000K: from there on it is 1M.
        if value >= 0.9995 * limit:
            return digits(value / limit) + unit
    return digits(value)


def power(value: float) -> str:
    """FLOPs: 2.18e13 -> 2.2×10¹³."""
    if not value > 0 or not math.isfinite(value):
        return str(value)
    exponent = math.floor(math.log10(value))
    mantissa = f"{value / 10**exponent:.2g}"
    # 9.96 rounds to 10.
    if mantissa == "10":
        mantissa, exponent = "1", exponent + 1
    ten = "10" + str(exponent).translate(SUPERSCRIPT)
    return ten if mantissa == "1" else f"{mantissa}×{ten}"


def digits(value: float, significant: int = 3) -> str:
    """Three significant digits without an exponent where that is readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = math.floor(math.log10(abs(value)))
    if size >= 6 or size < -4:
        return power(value) if value > 0 else f"{value:.2g}"
    rounded = round(value, significant - 1 - size)
    text = f"{rounded:.{max(0, significant - 1 - size)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for limit, unit in ((86400 * 2, "days"), (5400, "h"), (90, "min")):
        if seconds >= limit:
            return f"{digits(seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit], 2)} {unit}"
    return f"{digits(seconds, 2)} s"


def prettify(text: str) -> str:
    """1.2e+13 within a sentence -> 1.2×10¹³."""
    return re.sub(r"\b\d+(?:\.\d+)?e[+-]?\d+\b", lambda match: power(float(match[0])), text)


def log_ticks(low: float, high: float, form=digits) -> tuple[list[float], list[str]]:
    """Round values within a logarithmic range, about three to six, and their texts."""
    decades = math.log10(high / low)
    steps: tuple[float, ...] = (1,)
    for limit, finer in ((2.5, (1, 3)), (1.4, (1, 2, 5)), (0.7, (1, 1.5, 2, 3, 4, 5, 6, 8))):
        steps = finer if decades <= limit else steps
    stride = max(1, math.ceil(decades / 6))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [m * 10.0**e for e in exponents if e % stride == 0 for m in steps]
    values = [v for v in values if low * 0.999 <= v <= high * 1.001]
    if decades < 0.3 or len(values) < 2:
        values = _even_ticks(low, high)
    return values, [form(v) for v in values]


def _even_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in a range so narrow that a logarithmic axis is nearly even."""
    rough = (high - low) / 4
    power_of_ten = 10.0 ** math.floor(math.log10(rough))
    for step in (m * power_of_ten for m in (10, 5, 2, 1)):
        values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(values) >= 3:
            break
    return values
