"""Is luck called drift at most 5 % of the time, and how much drift is found? Draws of CLINC150 with known differences.

    python benchmarks/drift.py --draws 200

Both sides are drawn from the training file without one domain; the production side has a share of rows of that domain. With
a share of 0 the two are alike: `found` is then the share of false alarms, at most 5 % and chance (8 % of 200 draws).
Elsewhere it is the power. `auc` is the mean, `share_unlike` the mean of the bound on the share of rows that differ.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.0, 0.05, 0.2, 0.5)


def texts_of(data: Path, *, domain: str) -> tuple[list[str], list[str]]:
    """The texts of the other domains, and of the domain."""
    labels = set(json.loads((data / "domains.json").read_text("utf-8"))[domain])
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text("utf-8").split("\n") if line]
    return [r["text"] for r in rows if r["label"] not in labels], [r["text"] for r in rows if r["label"] in labels]


def simulated(others: list[str], planted: list[str], *, share: float, rows: int, draws: int) -> dict[str, float]:
    """How often a difference is found between so many rows on each side, and how large."""
    from tunesmith.data.curate.two_samples import tell_apart, vectors_of

    generator = np.random.default_rng(rows)
    is_second_N = np.arange(2 * rows) >= rows
    num_planted = round(share * rows)
    found = []
    for _ in range(draws):
        texts = [others[row] for row in generator.choice(len(others), 2 * rows, replace=False)]
        texts[2 * rows - num_planted :] = [planted[row] for row in generator.choice(len(planted), num_planted)]
        found.append(tell_apart(texts, vectors_of(texts), is_second_N=is_second_N)[0])
    p_N = np.array([apart.p for apart in found])
    return {
        "found": float(np.mean([apart.found for apart in found])),
        "p_below_0.05": float((p_N < 0.05).mean()),
        "p_median": float(np.median(p_N)),
        "auc": float(np.mean([apart.auc for apart in found])),
        "share_unlike": float(np.mean([apart.share_unlike for apart in found])),
        "detectable_auc": float(np.mean([apart.detectable for apart in found])),
    }


def table(report: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    lines = ["| rows a side | of another domain | found | AUC | at least unlike |", "|---:|---:|---:|---:|---:|"]
    for rows, by_share in report["found"].items():
        for share, found in by_share.items():
            cells = [f"{100 * float(share):g} %", f"{100 * found['found']:.1f} %", f"{found['auc']:.2f}"]
            lines.append(f"| {rows} | {' | '.join(cells)} | {100 * found['share_unlike']:.1f} % |")
    return "\n".join(lines)


def main() -> int:
    """Simulate, write the report and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "clinc150")
    parser.add_argument("--domain", default="travel", help="the domain that training lacks")
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 300, 1000], help="rows a side")
    parser.add_argument("--draws", type=int, default=200, help="without a difference; a quarter of it with one")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "drift.json")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "domain": arguments.domain, "draws": arguments.draws, "found": {}}
    others, planted = texts_of(arguments.data, domain=arguments.domain)
    for rows in arguments.rows:
        for share in SHARES:
            draws = arguments.draws if share == 0 else max(arguments.draws // 4, 1)
            found = simulated(others, planted, share=share, rows=rows, draws=draws)
            report["found"].setdefault(str(rows), {})[str(share)] = found
            print(rows, share, found, file=sys.stderr, flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
