"""Format counts, sizes and durations for people."""


def format_count(number: float) -> str:
    """Format 1234567 as `1.23M`. Small whole numbers are not abbreviated."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}" if number != int(number) else str(int(number))


def format_size(number: float) -> str:
    """Format bytes as `151 MB` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def format_duration(seconds: float) -> str:
    """Format seconds as `51s`, `4m10s`, `2h05m`, `3d04h`."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
