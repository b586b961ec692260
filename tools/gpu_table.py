"""What gpu_check.py prints: a line a result, and in the end the tables that docs/performance.md holds."""


def line(row: dict) -> str:
    """Returns a result in a line: when it came, what it is of, whether it is good, what was found."""
    if "left_out" in row:
        state, text = "left out", row["left_out"]
    else:
        state, text = {True: "ok", False: "FAILED"}.get(row.get("ok"), ""), row.get("note", "")
    took = f" [{row['took']:.0f} s]" if "took" in row else ""
    return f"{row['at']:6.0f} s  {row['part']:<9} {row['name']:<30} {state:<8} {text}{took}"


def table(rows: list[dict], settings: dict) -> str:
    """Returns card and versions, a table of speeds, and how many cases of each part were good."""
    found = {(row["part"], row["name"]): row for row in rows}
    machine = found.get(("machine", "machine"), {})
    peak = found.get(("matmul", "matmul"), {}).get("tflops")
    versions = ", ".join(f"{name} {number}" for name, number in machine.get("versions", {}).items())
    lines = [f"{machine.get('note', 'unknown machine')}; {versions}"]
    if peak:
        lines.append(f"Square matrix products in the same call: {peak:.4g} TFLOP/s.")
    lines += ["", *_speeds(rows, found, settings, peak), ""]
    lines += ["| part | good | failed | left out |", "| --- | --- | --- | --- |"]
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        left_out = sum("left_out" in row for row in of_part)
        failed = sum(row.get("ok") is False for row in of_part)
        lines.append(f"| {part} | {len(of_part) - left_out - failed} | {failed} | {left_out} |")
    return "\n".join(lines) + "\n"


def _speeds(rows: list[dict], found: dict, settings: dict, peak: float | None) -> list[str]:
    head = ["", "pairs/s", "tokens/s", "TFLOP/s", "of the peak", "peak GiB", "`tune plan` GiB", "counted / held"]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in rows:
        if row["part"] not in ("speed", "peers") or "pairs_per_second" not in row:
            continue
        counted = found.get(("plan", row["name"]), {}).get("counted_gib") if row["part"] == "speed" else None
        tflops, held = row.get("tflops"), row["peak_gib"]
        cells = [
            _what(row),
            f"{row['pairs_per_second']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{tflops:.4g}" if tflops else "",
            f"{tflops / peak:.0%}" if tflops and peak else "",
            f"{held:.2f}",
            f"{counted:.2f}" if counted else "",
            f"{counted / held:.3f}" if counted and settings["device"] == "cuda" else "",
        ]
        lines.append(_row(cells))
    return [*lines, *_ratios(rows, found)]


def _ratios(rows: list[dict], found: dict) -> list[str]:
    """Our live LoRA steps next to the best of each peer's."""
    ours, lines = found.get(("speed", "lora live"), {}).get("pairs_per_second"), []
    for peer in ("torchtune", "TRL") if ours else ():
        theirs = [row.get("pairs_per_second", 0.0) for row in rows if row["part"] == "peers" and peer in row["name"]]
        if any(theirs):
            lines.append(f"`lora live` makes {ours / max(theirs):.2f} times the pairs of {peer}'s best here.")
    return [""] * bool(lines) + lines


def _what(row: dict) -> str:
    words = f"{row['name']}: `{row['recipe']}`" if "recipe" in row else row["name"]
    told = [f"`{text}`" for text in row.get("overrides", []) if "cache_dir" not in text]
    return " ".join([words, *told])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
