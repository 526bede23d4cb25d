"""The readable table of an inspection."""

from __future__ import annotations

from typing import Any

_SHOWN = 10  # blocks and findings listed before "and n more"


def table(facts: dict[str, Any]) -> str:
    """What `inspect_store` found, a line a fact."""
    total = facts["num_blocks"]
    state = "complete" if facts["complete"] else "INCOMPLETE OR DAMAGED"
    rows = [
        (facts["path"], f"{facts['kind']}, format {facts['format_version']}, {state}"),
        ("blocks", f"{facts['committed_blocks']:,} of {total:,}"),
        ("sequences", _of(facts["num_sequences"], facts["planned_sequences"])),
        ("sequence length", _text(facts["seq_len"])),
        ("positions", f"{facts['num_positions']:,}"),
        ("bytes", f"{facts['bytes']:,}"),
        ("content hash", facts["content_hash"]),
        ("vocabulary", _text(facts["vocab_size"])),
        ("tokenizer", _text(facts["tokenizer"])),
    ]
    if facts["kind"] == "cache":
        parameters = ", ".join(f"{k} {v}" for k, v in facts["parameters"].items())
        rows += [
            ("teacher", _text(facts["teacher"])),
            ("method", f"{facts['method']} ({parameters})"),
            ("entries a position", _number(facts["entries_per_position"])),
            ("bytes a position", _number(facts["bytes_per_position"])),
            ("listed mass", _spread(facts["listed_mass"])),
            ("entropy, nats", _spread(facts["entropy"])),
            ("teacher nll, nats", _spread(facts["teacher_nll"])),
            *(("made with", _text(made)) for made in facts["made_with"]),
        ]
    else:
        counted = {k: v for k, v in facts["statistics"].items() if isinstance(v, int)}
        rows += [(k.replace("_", " "), f"{v:,}") for k, v in counted.items()]
    rows.append(("checked", "every byte" if facts["verified"] else "markers; --verify for bytes"))
    if facts["missing_blocks"]:
        rows.append(("missing blocks", _listed(facts["missing_blocks"])))
    width = max(len(name) for name, _ in rows[1:])
    lines = [": ".join(rows[0])] + [f"  {name:<{width}}  {value}" for name, value in rows[1:]]
    findings = facts["findings"]
    lines += [f"  DAMAGED  {finding}" for finding in findings[:_SHOWN]]
    if len(findings) > _SHOWN:
        lines.append(f"  DAMAGED  and {len(findings) - _SHOWN} more; --json lists all")
    return "\n".join(lines)


def _of(part: int, whole: int | None) -> str:
    return f"{part:,}" if whole is None else f"{part:,} of {whole:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(values: dict[str, float] | None) -> str:
    if values is None:
        return "-"
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def _listed(blocks: list[int]) -> str:
    more = f" and {len(blocks) - _SHOWN:,} more" if len(blocks) > _SHOWN else ""
    return ", ".join(map(str, blocks[:_SHOWN])) + more


def _text(value: Any) -> str:
    """One line for a recipe's member: hashes shortened, for people; --json has them whole."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
