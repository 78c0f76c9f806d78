"""How well a config learns: held-out accuracy before and after, over several seeds.

    python -m bench.learning examples/quickstart/run.yaml --seeds 0 1 2

Runs `maspo train` once for each seed, one after the other, in a new folder each, and reports what the runs wrote down. Flags after
`--` go to `maspo train`. Minutes are wall time of the whole command, start-up included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def run_seed(config: str, seed: int, folder: Path, flags: list[str]) -> dict[str, float]:
    """Returns the figures of one run."""
    run_dir = folder / f"seed_{seed}"
    command = [sys.executable, "-m", "maspo_ray", "train", config, "--seed", str(seed), "--run_dir", str(run_dir)]
    started = time.perf_counter()
    subprocess.run([*command, "--logging.progress", "off", *flags], check=True, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - started) / 60
    summary = json.loads((run_dir / "summary.json").read_text())
    names = ("accuracy_before", "accuracy_after", "steps", "staleness_mean", "staleness_max", "parity_max")
    shares = ("learner_wait_share", "rollout_idle_share")
    return {"seed": seed, "minutes": minutes} | {name: summary[name] for name in names + shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, flags = parser.parse_known_args()
    folder = Path("runs") / f"learning-{time.strftime('%Y%m%d-%H%M%S')}"
    rows = []
    print("seed  before   after  steps  minutes  staleness mean/max  learner waited  rollout idle  parity max")
    for seed in options.seeds:
        row = run_seed(options.config, seed, folder, [flag for flag in flags if flag != "--"])
        rows.append(row)
        print(
            f"{seed:4d}  {row['accuracy_before']:6.1%}  {row['accuracy_after']:6.1%}  {row['steps']:5.0f}  "
            f"{row['minutes']:7.1f}  {row['staleness_mean']:12.2f} / {row['staleness_max']:.0f}  "
            f"{row['learner_wait_share']:14.1%}  {row['rollout_idle_share']:12.1%}  {row['parity_max']:10.1e}",
            flush=True,
        )
    medians = {
        name: statistics.median(row[name] for row in rows) for name in ("accuracy_before", "accuracy_after", "minutes")
    }
    print(json.dumps({"bench": "learning", "config": options.config, "median": medians, "runs": rows}))


if __name__ == "__main__":
    main()
