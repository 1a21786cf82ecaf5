"""The results on one page of plain text."""

from __future__ import annotations

from typing import Any

__all__ = ["choice_line", "page_of"]


def page_of(content: dict[str, Any]) -> str:
    """A line for each thing that was checked or measured.

    Parameters
    ----------
    content : dict
        What `momentkv.testing.gpu.run` wrote.
    """
    about = content["about"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "cuda", "numpy") if about[name])
    tuned = f"; tuned sizes of {about['tuned']} kinds of launches" if about.get("tuned") else ""
    lines = ["", f"{about['device']['name']}; {versions}; {about['date']}{tuned}"]
    for part in content["parts"]:
        lines += ["", f"{part['name']}: {part['state']}" + (f" ({last(part['why'])})" if part["why"] else "")]
        lines += SUMMARIES.get(part["name"].partition(",")[0], one_by_one)(part["rows"])
    if content.get("predictions"):
        lines += ["", "predicted, not measured: us of a call"]
    for row in content.get("predictions", ()):
        shape = ",".join(str(x) for x in list(row["shape"].values())[:5])
        lines.append(
            f"  {row['gpu']:<5} {shape:<18} {row['name']:<20} {row['launches']} launches  {row['blocks']} blocks  "
            f"{row['bytes'] / 2**20:7.1f} MiB  {row['seconds'] * 1e6:7.1f}"
        )
    return "\n".join(lines)


def last(text: str) -> str:
    """The line of a traceback that says what happened."""
    return text.strip().splitlines()[-1]


def of_kernels(rows: list[dict[str, Any]]) -> list[str]:
    """How many are right, which are wrong, and the largest error."""
    if not rows:
        return []
    worst = max(rows, key=lambda row: row["share"])
    right = sum(row["right"] for row in rows)
    wrong = [
        f"  wrong: {row['case']}: {row.get('why') or '{:.3g} times what rounding explains'.format(row['share'])}"
        for row in rows
        if not row["right"]
    ]
    largest = max(row["relative"] for row in rows)
    return [
        f"  {right} of {len(rows)} cases are right; the worst takes {worst['share']:.0%} of what rounding explains "
        f"({worst['case']}); largest relative error {largest:.1e}",
        *wrong,
    ]


def of_checks(rows: list[dict[str, Any]]) -> list[str]:
    """How many operators do what they say, and what is wrong with the others."""
    right = sum(row["right"] for row in rows)
    wrong = [f"  wrong: {row['operator']}, {row['case']}: {row['why']}" for row in rows if not row["right"]]
    return [f"  {right} of {len(rows)} calls are as the operators say", *wrong] if rows else []


def of_tuning(rows: list[dict[str, Any]]) -> list[str]:
    """What was chosen of each kind, and which candidates err."""
    return [choice_line(row) for row in rows if row.get("chosen") or row.get("right") is False]


def choice_line(row: dict[str, Any]) -> str:
    """A candidate, or a choice, on a line."""
    family, choice = row["family"], row["choice"]
    bits = f", {family['bits'] / 2:g} bits" if family["bits"] else ""
    name = f"  {family['dtype']}, d {family['d']}, estimate {family['estimate']}{bits}"
    sizes = ", ".join(f"{name.removeprefix('num_')} {size}" for name, size in choice.items())
    if row.get("chosen"):
        return f"{name}: {sizes}: {row['share']:.0%} of the time of the built-in sizes"
    return f"{name}: {sizes}: " + ("right" if row["right"] else "WRONG" if row["fits"] else "no room")


def of_graphs(rows: list[dict[str, Any]]) -> list[str]:
    """Differences and times, a line for each kind of cache."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        if "seconds" in row:
            kinds[row["kind"]].append(f"{row['name']} {microseconds(row)}")
        else:
            verdict = "equal" if row["right"] else "DIFFERENT"
            kinds[row["kind"]] = [f"{verdict} (off by {row['difference']:.2g} of {row['largest']:.2g})"]
    return [f"  {kind}: {', '.join(said)}" for kind, said in kinds.items()]


def of_flushes(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each way and number of layers."""
    return [f"  batch {row['batch']}, layers {row['layers']}, {row['name']}: {microseconds(row)}" for row in rows]


def one_by_one(rows: list[dict[str, Any]]) -> list[str]:
    """A line a row."""
    lines, copy = [], next((rate(row) for row in rows if row.get("name") == "copy"), 0.0)
    for row in rows:
        if "seconds" not in row:
            lines.append("  " + ", ".join(f"{name} {said(x)}" for name, x in row.items() if name != "said"))
            continue
        shape = ",".join(str(x) for x in list(row.get("shape", {}).values())[:5])
        share = f"{rate(row) / copy:6.0%} of copy" if copy and row["bytes"] else ""
        lines.append(f"  {shape:<18} {row['name']:<28} {microseconds(row):>12} {share}".rstrip())
    return lines


def said(x: Any) -> str:
    """A value in short."""
    return f"{x:.3g}" if isinstance(x, float) else str(x)


def rate(row: dict[str, Any]) -> float:
    """Bytes a second."""
    return float(row["bytes"] / row["seconds"]["median"])


def microseconds(row: dict[str, Any]) -> str:
    """Median time."""
    return f"{row['seconds']['median'] * 1e6:.1f} us"


def of_compiled(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel."""
    lines = {}
    for row in rows:
        spilled = f", {row['stack']} bytes spilled, {row['looped']} accesses in loops" if row["stack"] else ""
        lines[row["kernel"], row["target"]] = (
            f"  sm_{row['target']} {row['registers']:3} registers, {row['shared'] / 1024:5.1f} KiB, {row['blocks']:2} "
            f"blocks: {row['kernel']}{spilled}"
        )
    return list(lines.values())


def of_bytes(rows: list[dict[str, Any]]) -> list[str]:
    """That they were counted: the predictions show them."""
    return [f"  {len(rows)} counted"] if rows else []


SUMMARIES = {
    "kernels": of_kernels,
    "steps as graphs": of_graphs,
    "flushes as graphs": of_flushes,
    "operators PyTorch checks": of_checks,
    "tuning": of_tuning,
    "compiled kernels": of_compiled,
    "bytes of kernels": of_bytes,
}
