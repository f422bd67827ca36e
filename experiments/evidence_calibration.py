"""Writes what the verdict of `js0` compares with: hessian_tools/assets/calibration.json.

`python experiments/evidence_calibration.py [--asset FILE]` reads results/evidence/runs.jsonl.gz,
results/evidence_readings/readings.jsonl and results/evidence_verdict/result.json, and no more, and
enters the file's checksum in the README beside it. A test holds that the packaged file is what they
give. Pairs that are not trained or read yet, and those on which neither optimizer came below the
start, are left out.
"""

import argparse
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from evidence import HELD_OUT
from evidence.arms import LONG
from evidence.gaps import TIE, Gap
from evidence.lines import Packed
from evidence.pair import BATCH_SIZE
from evidence_readings import known
from evidence_verdict import LABELS, MAIN, READINGS, RUNS, share

import hessian_tools as ht
from hessian_tools.heterogeneity.calibration import ASSET
from hessian_tools.results import JsonObject

TARGET = Path("hessian_tools/assets") / ASSET
RESULT = Path("results/evidence_verdict/result")
DIGITS = 4
ROW = r"\| `{}` \| [\d,]+ \| `[0-9a-f]{{64}}` \|"  # of the file in the README beside it


def calibration(
    gaps: Mapping[tuple[str, str, int], Gap],
    readings: Mapping[str, JsonObject],
    result: JsonObject,
) -> JsonObject:
    """What the file holds."""
    pairs = []
    for name, line in sorted(readings.items()):
        gap = gaps.get((name, "main", LONG))
        predictors = line.get("predictors", {})
        found = [predictors.get("scale"), predictors.get("curvature")]
        if gap is None or math.isnan(gap.g1) or None in found:
            continue
        scale, curvature = (round(max(value, 0.0), DIGITS) for value in found)
        pair = {"name": name, "scale": scale, "curvature": curvature}
        pairs.append({**pair, "gap": round(share(gap), DIGITS)})
    return {
        "pairs": pairs,
        "batch_size": BATCH_SIZE,
        "num_steps": LONG,
        "tie": TIE,
        "finding": finding(result),
    }


def finding(result: JsonObject) -> str:
    """What the analysis of the protocol came to, in a sentence."""
    table = next((table for table in result["open"] if table["target"] == MAIN), None)
    if table is None:
        return "Too few families are trained yet for a reading to be judged."
    survivors = [name for name, survives in result.get("survives", {}).items() if survives]
    if survivors:
        named = " and ".join(LABELS[name] for name in survivors)
        return f"On families that it had not seen, {named} told which."
    if result.get("survives"):
        return "No reading told which on families that it had not seen."
    if table["candidates"]:
        named = " and ".join(LABELS[name] for name in table["candidates"])
        return (
            f"Of ten readings {named} passed the bar set in advance on {table['families']} "
            f"families, and is not held against the {len(HELD_OUT)} held-out ones yet."
        )
    return f"None of ten readings passed the bar set in advance on {table['families']} families."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--asset", type=Path, default=TARGET, metavar="FILE")
    options = parser.parse_args()
    gaps = {key: gap for key, (gap, _) in Packed(RUNS).gaps().items()}
    found = calibration(gaps, known(READINGS), ht.load(RESULT))
    pairs = ",\n  ".join(json.dumps(pair) for pair in found.pop("pairs"))
    rest = json.dumps(found, indent=1)[1:-2]
    options.asset.write_text(f'{{\n "pairs": [\n  {pairs}\n ],{rest}\n}}\n')
    print(f"{options.asset} written")
    if options.asset == TARGET:
        enter_in_readme(TARGET)


def enter_in_readme(asset: Path) -> None:
    """Size and checksum, in the list of what is packaged."""
    readme = asset.with_name("README.md")
    content = asset.read_bytes()
    row = f"| `{asset.name}` | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |"
    text, count = re.subn(ROW.format(re.escape(asset.name)), row, readme.read_text())
    assert count == 1, f"{readme} has no row for {asset.name}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
