"""The readable tables of an inspection and of a comparison."""

from __future__ import annotations

from typing import Any

from megadistill.errors import ADVICE

Rows = list[tuple[str, str]]

_SHOWN = 10  # blocks, findings and members listed before "and n more"
_UNITS = {
    1000: ("", "thousand", "million", "billion", "trillion"),
    1024: ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"),
}


def table(facts: dict[str, Any]) -> str:
    """Formats the facts of `inspect_store`, one per line."""
    state = "complete" if facts["complete"] else "DAMAGED" if facts["findings"] else "INCOMPLETE"
    title = f"{facts['path']}: {facts['kind']}, format {facts['format_version']}, {state}"
    return "\n".join([title, *_lines(_rows(facts)), *_findings(facts["findings"])])


def _rows(facts: dict[str, Any]) -> Rows:
    rows = [
        (
            "blocks",
            f"{_of(facts['committed_blocks'], facts['num_blocks'])}, "
            f"of {facts['block_size']:,} sequences",
        ),
        (
            "sequences",
            f"{_of(facts['num_sequences'], facts['planned_sequences'])}, "
            f"of {_text(facts['seq_len'])} tokens",
        ),
        ("positions", _human(facts["num_positions"], 1000)),
        ("size on disk", _human(facts["bytes"], 1024)),
        ("content hash", facts["content_hash"]),
        ("data", _text(facts["data"])),
        ("tokenizer", _text(facts["tokenizer"])),
        ("vocabulary", f"{_text(facts['vocab_size'])} ids"),
    ]
    if facts["kind"] == "cache":
        rows += _target_rows(facts)
    else:
        counted = {k: v for k, v in facts["statistics"].items() if isinstance(v, int)}
        if "cut_tokens" not in counted and "cut_documents" in counted:
            # Stores of before best-fit packing counted each cut of a document.
            counted = {"cuts" if k == "cut_documents" else k: v for k, v in counted.items()}
        rows += [(k.replace("_", " "), _human(v, 1000)) for k, v in counted.items()]
    rows.append(("checked", "every byte" if facts["verified"] else "markers; --verify for bytes"))
    if facts["unfinished"]:
        rows.append(("unfinished", facts["unfinished"]))
    if facts["missing_blocks"]:
        rows.append(("missing blocks", _listed(facts["missing_blocks"])))
    return rows


def _target_rows(facts: dict[str, Any]) -> Rows:
    parameters = ", ".join(f"{k} {v}" for k, v in facts["parameters"].items())
    return [
        ("teacher", _text(facts["teacher"])),
        ("method", f"{facts['method']} ({parameters})"),
        ("entries", f"{_number(facts['entries_per_position'])} a position"),
        ("bytes", f"{_number(facts['bytes_per_position'])} a position"),
        ("listed mass", _spread(facts["listed_mass"], "")),
        ("entropy", _spread(facts["entropy"], "nats")),
        ("teacher nll", _spread(facts["teacher_nll"], "nats")),
        *(("made with", _text(made)) for made in facts["made_with"]),
    ]


def difference_table(facts: dict[str, Any]) -> str:
    """Formats `diff_stores`' facts, most telling first. A is the left store, B the right one."""
    rows: Rows = [("A", facts["left"]), ("B", facts["right"])]
    for entry in facts["recipe"][:_SHOWN]:
        rows += [(entry["field"], f"A {_text(entry['left'])}"), ("", f"B {_text(entry['right'])}")]
    if len(facts["recipe"]) > _SHOWN:
        rows.append(("", f"and {len(facts['recipe']) - _SHOWN} more members; --json lists all"))
    if facts["plan"]:
        plans = [_text(facts["plan"][side]) for side in ("left", "right")]
        rows.append(("planned sequences", f"A {plans[0]}, B {plans[1]}"))
    rows += _block_rows(facts)
    lines = ["EQUAL in content" if facts["equal"] else "DIFFERENT", *_lines(rows)]
    if facts["first"]:
        lines += _first_lines(facts["first"])
    differences = [
        f"{e['field']}: A {_text(e['left'])}, B {_text(e['right'])} (block {_listed(e['blocks'])})"
        for e in facts["told"][:_SHOWN]
    ]
    if len(facts["told"]) > _SHOWN:
        differences.append(f"and {len(facts['told']) - _SHOWN} more; --json lists all")
    if not (differences or facts["only_left"] or facts["only_right"] or facts["different_blocks"]):
        differences = [f"{n}: should follow from the equal markers" for n in facts["derived"]]
    if differences:
        lines += [
            "  differs too, and is no part of the content:",
            *(f"    {t}" for t in differences),
        ]
    return "\n".join(lines)


def _block_rows(facts: dict[str, Any]) -> Rows:
    if facts["blocks_in_both"] is None:
        return [("blocks", "of other sizes, not compared")]
    rows = [
        (f"blocks only in {side}", _listed(facts[name]))
        for side, name in (("A", "only_left"), ("B", "only_right"))
        if facts[name]
    ]
    different = facts["different_blocks"]
    both = f"{facts['blocks_in_both']:,} in both, {len(different):,} of them with other content"
    return [*rows, ("blocks", both + (f": {_listed(different)}" if different else ""))]


def _first_lines(first: dict[str, Any]) -> list[str]:
    where = f"  first difference: block {first['block']}"
    if first["sequence"] is None:
        return [f"{where}, in its bytes; all of it is equal when decoded"]
    where += f", sequence {first['sequence']}"
    if first["position"] is None:
        return [f"{where}: one of them ends there"]
    left, right = first["left"], first["right"]
    rows = [("", "A", "B")]
    for name in [n for n in left | right if n not in ("ids", "weights")]:
        rows.append((name.replace("_", " "), _text(left.get(name)), _text(right.get(name))))
    weights = [
        dict(zip(s.get("ids", []), s.get("weights", []), strict=True)) for s in (left, right)
    ]
    entries = [(token, *(side.get(token) for side in weights)) for token in weights[0] | weights[1]]
    parted = [(token, a, b) for token, a, b in entries if a != b]
    rows += [(f"weight of id {t}", _weight(a), _weight(b)) for t, a, b in parted[:_SHOWN]]
    if len(parted) > _SHOWN:
        rows.append((f"and {len(parted) - _SHOWN} more ids", "", ""))
    lines = [
        f"    {name:<22}  {a:<14}  {b:<14}{'  differs' if name and a != b else ''}".rstrip()
        for name, a, b in rows
    ]
    return [f"{where}, position {first['position']}", *lines]


def _lines(rows: Rows) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _findings(findings: list[str]) -> list[str]:
    lines = [f"  DAMAGED  {finding.removesuffix(ADVICE)}" for finding in findings[:_SHOWN]]
    if len(findings) > _SHOWN:
        lines.append(f"  DAMAGED  and {len(findings) - _SHOWN} more; --json lists all")
    if findings:
        lines.append(
            "  `tools/merge_and_inspect.py --repair CACHE` drops damaged blocks, and generating "
            "again makes them anew"
        )
    return lines


def _of(part: int, whole: int | None) -> str:
    return f"{part:,}" if whole is None else f"{part:,} of {whole:,}"


def _human(number: int, base: int) -> str:
    """Returns the exact number, and the same in readable units."""
    value, unit = float(number), 0
    while value >= base and unit + 1 < len(_UNITS[base]):
        value, unit = value / base, unit + 1
    exact = f"{number:,} bytes" if base == 1024 else f"{number:,}"
    return exact if unit == 0 else f"{exact} ({value:.4g} {_UNITS[base][unit]})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _weight(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _spread(values: dict[str, float] | None, unit: str) -> str:
    """Formats mean and quantiles."""
    if values is None:
        return "-"
    return (
        f"mean {values['mean']:.4f} {unit}".rstrip()
        + f"; 5% below {values['p05']:.4f}, half below {values['p50']:.4f}, "
        + f"95% below {values['p95']:.4f}"
    )


def _listed(blocks: list[int]) -> str:
    more = f" and {len(blocks) - _SHOWN:,} more" if len(blocks) > _SHOWN else ""
    return ", ".join(map(str, blocks[:_SHOWN])) + more


def _text(value: Any) -> str:
    """Formats a member of a recipe in a line, with shortened hashes; --json has them whole."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
