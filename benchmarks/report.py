"""The result of a benchmark: medians with their spread, ratios, targets met or missed; as a table and as JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import matmul_peak, processor_name

RESULTS = Path(__file__).parent / "results"
OURS = "hf_mm"
PACKAGES = ("torch", "torchvision", "transformers", "open_clip_torch", "faiss-cpu", "datasets", "pillow", "hf-mm")
RATES = {"pictures_per_second": "{:.0f}", "gflops": "{:.0f}", "share_of_peak": "{:.0%}"}


class Report:
    """Collects what was measured, prints it as a table, and writes both forms under ``benchmarks/results/``.

    Args:
        name: of the script.
        title: one line.
        args: see `read_arguments`.
        notes: what a reader must know to read the table.
    """

    def __init__(self, name: str, title: str, args: argparse.Namespace, notes: list[str]):
        self.name, self.title, self.args, self.notes = name, title, args, notes
        self.peak = matmul_peak(args.device, args.dtype, args.quick)
        self.claims: list[dict[str, Any]] = []

    def add(
        self,
        case: str,
        costs: dict[str, list[float]],
        unit: str = "ms",
        scale: float = 1e3,
        at_least: float | None = None,
        at_most: float | None = None,
        pictures: int | None = None,
        flops: float | dict[str, float] | None = None,
        share: float | None = None,
    ) -> None:
        """Adds one comparison of `OURS` with the best (the lowest median) of the others.

        Args:
            case: what was measured.
            costs: see `interleave`; lower is better.
            unit: that costs are shown in, `scale` of them to one of `costs`.
            at_least: target of the peer's cost divided by ours.
            at_most: target of our cost divided by the peer's; without either the ratio is shown without a target. Both
                the ratio of medians and the median of the rounds' ratios must meet it.
            pictures: that one run prepares; shown a second.
            flops: of one run, or of one run of each; shown a second, and as share of the matrix-multiply peak.
            share: target of our share.
        """
        peer = min((name for name in costs if name != OURS), key=lambda name: statistics.median(costs[name]))
        over, under = (OURS, peer) if at_most else (peer, OURS)
        of_medians = statistics.median(costs[over]) / statistics.median(costs[under])
        per_round = statistics.median(a / b for a, b in zip(costs[over], costs[under], strict=True))
        ratios, met = (of_medians, per_round), None
        if at_least or at_most:
            met = max(ratios) <= at_most if at_most else min(ratios) >= at_least
        self.claims.append(
            {
                "case": case,
                "unit": unit,
                "best_peer": peer,
                "ratio": f"{over} / {under}",
                "ratio_of_medians": of_medians,
                "median_of_round_ratios": per_round,
                "target": f"≤ {at_most}" if at_most else f"≥ {at_least}" if at_least else None,
                "met": met,
                "share_target": share,
                "contenders": {
                    name: {
                        **_spread([value * scale for value in values]),
                        **_rates(
                            statistics.median(values), pictures, flops[name] if isinstance(flops, dict) else flops
                        ),
                        "rounds": values,
                    }
                    for name, values in costs.items()
                },
            }
        )

    def finish(self) -> None:
        """Prints the tables and, unless this was a quick check, writes them."""
        self.peak = max(self.peak, matmul_peak(self.args.device, self.args.dtype, self.args.quick))
        for claim in self.claims:
            for row in claim["contenders"].values():
                if "gflops" in row:
                    row["share_of_peak"] = row["gflops"] / self.peak
        text = self._markdown()
        print(text)
        if self.args.quick:
            print("A quick check: nothing of this is a measurement, and nothing was written.")
            return
        suffix = ("-cuda" if self.args.device == "cuda" else "") + ("-bf16" if self.args.dtype == "bfloat16" else "")
        RESULTS.mkdir(exist_ok=True)
        content = {"title": self.title, "environment": self.environment(), "notes": self.notes, "claims": self.claims}
        for ending, written in ((".json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"), (".md", text)):
            (RESULTS / f"{self.name}{suffix}{ending}").write_text(written, encoding="utf-8")

    def environment(self) -> dict[str, Any]:
        return {
            "processor": processor_name(self.args.device),
            "threads": torch.get_num_threads(),
            "dtype": self.args.dtype + (" (autocast)" if self.args.dtype == "bfloat16" else ""),
            "matmul_peak_gflops": round(self.peak, 1),
            "rounds": self.args.rounds,
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
        }

    def _markdown(self) -> str:
        environment = ", ".join(f"{name} {value}" for name, value in self.environment().items())
        lines = [f"# {self.title}", "", f"{environment}.", ""]
        lines += [f"- {note}" for note in self.notes] + [""] * bool(self.notes)
        for claim in self.claims:
            lines += [f"## {claim['case']}", "", *_table(claim), ""]
            lines += [f"{_verdict(claim)}", ""]
        return "\n".join(lines)


def _table(claim: dict[str, Any]) -> list[str]:
    first = next(iter(claim["contenders"].values()))
    rates = {name: form for name, form in RATES.items() if name in first}
    header = ["", f"median ({claim['unit']})", "quartiles", "min–max", *(name.replace("_", " ") for name in rates)]
    rows = [header, ["---"] * len(header)]
    for name, row in claim["contenders"].items():
        spread = (f"{row[low]:.4g}–{row[high]:.4g}" for low, high in (("q1", "q3"), ("min", "max")))
        rows.append([name, f"{row['median']:.4g}", *spread, *(form.format(row[rate]) for rate, form in rates.items())])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _verdict(claim: dict[str, Any]) -> str:
    ratios = f"{claim['ratio_of_medians']:.2f} (medians), {claim['median_of_round_ratios']:.2f} (median of rounds)"
    if claim["target"] is None:
        return f"{claim['ratio']}: {ratios}; no target."
    verdict = f"{claim['ratio']}: {ratios}; target {claim['target']}: **{_met(claim['met'])}**."
    if claim["share_target"]:
        share = claim["contenders"][OURS]["share_of_peak"]
        met = _met(share >= claim["share_target"])
        verdict += f" Share of peak of {OURS}: {share:.0%}; target ≥ {claim['share_target']:.0%}: **{met}**."
    return verdict


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _rates(median: float, pictures: int | None, flops: float | None) -> dict[str, float]:
    rates = {"pictures_per_second": pictures / median} if pictures else {}
    return rates | ({"gflops": flops / median / 1e9} if flops else {})


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
