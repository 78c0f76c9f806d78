"""Submits the quickstart to a Ray cluster that is running, follows its log and ends with its exit code.

Sends the working directory and nothing else: the nodes have the dependencies installed, not the project. What the job makes (model,
data, run) goes to a folder that every node sees, since a job's own copy of the working directory is removed after it.
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePosixPath

from ray.job_submission import JobStatus, JobSubmissionClient


def entrypoint(folder: PurePosixPath, name: str, overrides: Sequence[str]) -> str:
    """Returns the job's command: make model and data, unless they are there, then train."""
    made = folder / "quickstart"
    train = [
        *("python", "-m", "maspo_ray", "train", "examples/quickstart/run.yaml"),
        *("--model.path", f"{made}/model"),
        *("--data.train.path", f"{made}/data/train.jsonl"),
        *("--data.eval.path", f"{made}/data/heldout.jsonl"),
        *("--run_dir", f"{folder}/runs/{name}"),
        *overrides,
    ]
    return f"{shlex.join(['python', 'examples/quickstart/prepare.py', '--folder', str(made)])} && {shlex.join(train)}"


async def follow(client: JobSubmissionClient, job: str) -> JobStatus:
    """Prints the job's log as it grows; returns how the job ended."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
    while not (status := client.get_job_status(job)).is_terminal():
        await asyncio.sleep(0.5)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config can follow as --section.key value.",
    )
    parser.add_argument(
        "--address", help="of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS, else this machine"
    )
    parser.add_argument(
        "--folder", type=PurePosixPath, required=True, help="absolute; every node of the cluster sees it"
    )
    options, overrides = parser.parse_known_args()
    if not options.folder.is_absolute():
        parser.error(f"--folder is {options.folder}; it must be absolute. Give a folder that every node sees.")
    name = f"quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    client = JobSubmissionClient(options.address)
    job = client.submit_job(
        entrypoint=entrypoint(options.folder, name, overrides), submission_id=name, runtime_env={"working_dir": "."}
    )
    status = asyncio.run(follow(client, job))
    print(f"job {job}: {status.value}; its run is in {options.folder}/runs/{name}")
    return 0 if status == JobStatus.SUCCEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
