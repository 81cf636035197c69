"""Prints the table of all results that the README shows: python -m benchmarks.summary"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table() -> str:
    """One row a claim: the ratio of medians to the best peer, its target, and whether it was met."""
    lines = ["| | against | ratio | target | |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for claim in result["claims"]:
            title = f"{result['title']}: {claim['case']}"
            ratio = f"{claim['ratio_of_medians']:.2f}"
            verdict = {True: "met", False: "missed", None: ""}[claim["met"]]
            lines.append(f"| {title} | {claim['best_peer']} | {ratio} | {claim['target'] or '–'} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
