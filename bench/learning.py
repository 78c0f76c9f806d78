"""How well a config learns: held-out accuracy before and after, over several seeds.

    python -m bench.learning examples/quickstart/run.yaml --seeds 0 1 2

Runs `maspo train` once for each seed, one after the other, in a new folder each, and reports what the runs wrote down. Flags after
`--` go to `maspo train`. Minutes are wall time of the whole command, start-up included.

With `--against DIR`, another checkout of the project in which the model and the data were made, each seed runs there too, in turn, by the
config of this name there, and `minutes_over_other` is the ratio of the minutes: a machine's speed changes from hour to hour, so that
minutes of two days say nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run_seed(checkout: Path, config: str, seed: int, run_dir: Path, flags: list[str]) -> dict[str, float]:
    """Returns the figures of one run."""
    command = [sys.executable, "-m", "maspo_ray", "train", config, "--seed", str(seed), "--run_dir", str(run_dir)]
    started = time.perf_counter()
    subprocess.run([*command, "--logging.progress", "off", *flags], check=True, stdout=subprocess.DEVNULL, cwd=checkout)
    minutes = (time.perf_counter() - started) / 60
    summary = json.loads((run_dir / "summary.json").read_text())
    names = ("accuracy_before", "accuracy_after", "steps", "staleness_mean", "staleness_max", "parity_max")
    shares = ("learner_wait_share", "rollout_idle_share")
    return {"seed": seed, "minutes": minutes} | {name: summary[name] for name in names + shares}


def row_text(row: dict[str, float]) -> str:
    return (
        f"{row['seed']:4.0f}  {row['accuracy_before']:6.1%}  {row['accuracy_after']:6.1%}  {row['steps']:5.0f}  "
        f"{row['minutes']:7.1f}  {row['staleness_mean']:12.2f} / {row['staleness_max']:.0f}  "
        f"{row['learner_wait_share']:14.1%}  {row['rollout_idle_share']:12.1%}  {row['parity_max']:10.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--against", type=Path, metavar="DIR")
    options, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    folder = Path("runs").absolute() / f"learning-{time.strftime('%Y%m%d-%H%M%S')}"
    rows, ratios = [], []
    print("seed  before   after  steps  minutes  staleness mean/max  learner waited  rollout idle  parity max")
    checkouts = {"this": Path()} | ({"other": options.against} if options.against is not None else {})
    for seed in options.seeds:
        found = {}
        for name, checkout in checkouts.items():
            found[name] = run_seed(checkout, options.config, seed, folder / f"{name}_{seed}", flags)
            print(f"{row_text(found[name])}  {name if len(checkouts) > 1 else ''}", flush=True)
        rows.append(found["this"])
        if "other" in found:
            ratios.append(found["this"]["minutes"] / found["other"]["minutes"])
        # The other way round next time, for what drifts.
        checkouts = dict(reversed(checkouts.items()))
    names = ("accuracy_before", "accuracy_after", "minutes")
    medians = {name: statistics.median(row[name] for row in rows) for name in names}
    figures: dict[str, Any] = {"bench": "learning", "config": options.config, "median": medians, "runs": rows}
    if ratios:
        ratio = statistics.median(ratios)
        print(f"minutes over the other's: {ratio:.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
        figures |= {"minutes_over_other": ratio, "spread": {"minutes_over_other": [min(ratios), max(ratios)]}}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
