"""`maspo train | check | replay | docs`.

Promise: bad input is one line on standard error and exit code 2, before an actor is started; a run that fails says why and exits
with 1, one that was interrupted with 130. What the framework logs, from INFO on, is shown on standard error while a command runs; the
loggers of others are left alone, and so is the framework's where it is called from Python.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from maspo_ray.config import load_config
from maspo_ray.config.page import config_page, section_lines
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.stop_signals import EXIT_CODE, stop_signals
from maspo_ray.terminal import patient_streams

_EXIT_FAILED, _EXIT_BAD_INPUT, _EXIT_INTERRUPTED = 1, 2, EXIT_CODE


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options, overrides = _parser().parse_known_args(arguments)
    with patient_streams(), stop_signals(exits=True):
        return _run(options, overrides)


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs the command that the options name; returns the exit code, having said why it is not 0."""
    if options.command == "docs":
        print(config_page(), end="")
        return 0
    try:
        with _messages_shown():
            if options.command == "check":
                return _check(options.config, overrides)
            if options.command == "replay":
                return _replay(options.run_dir, options.step, options.start, overrides)
            return _train(options.config, overrides, options.resume)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return _EXIT_BAD_INPUT
    except RunError as error:
        for line in [f"error: {error}", *getattr(error, "__notes__", [])]:
            print(line, file=sys.stderr)
        return _EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted before anything was saved", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    epilog = "\n".join(["sections of a config (all their keys: maspo docs config):", *section_lines()])
    layout: dict[str, Any] = {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="maspo",
        description="Reinforcement learning with verifiable rewards on Ray: MASPO, asynchronous.",
        **layout,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "train; any key of the config can follow as --section.key value"),
        ("check", "validate a config, print it resolved and where its actors would run; starts nothing"),
    ):
        command = commands.add_parser(name, help=text, description=text, **layout)
        command.add_argument("config", help="YAML file")
        if name == "train":
            command.add_argument("--resume", action="store_true", help="go on with the run in run_dir")
    text = (
        "make a step of a run again and compare what comes of it; keys of its config can follow as --section.key value"
    )
    command = commands.add_parser("replay", help=text, description=text)
    command.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run")
    command.add_argument(
        "--step", type=int, required=True, help="the step to replay; the run must have saved a model after it"
    )
    command.add_argument(
        "--start", type=int, help="begin after this step, 0 being the start; by default the last that can be"
    )
    text = "print a page in Markdown: every key of the config, its type, default and meaning"
    commands.add_parser("docs", help=text, description=text).add_argument("page", choices=["config"])
    return parser


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at the time: the live display of a run stands in for it, so that the two do not mix."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def _messages_shown() -> Iterator[None]:
    """Shows the framework's messages, from INFO on, as plain lines."""
    logger, handler = logging.getLogger("maspo_ray"), _StandardError()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # A handler that some library gave the root logger would show each message once more.
    logger.propagate = False
    # Of a home that it cannot write its cache to, which changes nothing here, it would say so in two lines.
    plots = logging.getLogger("matplotlib")
    plots_before = plots.level
    plots.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        plots.setLevel(plots_before)
        logger.propagate = before[1]


def _check(path: str, overrides: Sequence[str]) -> int:
    from maspo_ray.config.without_effect import warn_of_keys_without_effect
    from maspo_ray.dtype_speed import hint_at_slow_bfloat16
    from maspo_ray.fleet.loading import load_plugins
    from maspo_ray.fleet.memory import say_what_they_take
    from maspo_ray.fleet.placement import config_nodes, demands, plan
    from maspo_ray.preflight import preflight
    from maspo_ray.sampling import say_what_the_ratio_leaves_out

    config = load_config(path, overrides)
    warn_of_keys_without_effect(config)
    rows = preflight(config, resume=False)
    rows.check_answers(load_plugins(config).check_answer, config.reward.actor)
    rows.warn()
    hint_at_slow_bfloat16(config.model, config.learner)
    say_what_the_ratio_leaves_out(config.rollout)
    planned = plan(demands(config), config_nodes(config.placement))
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    print(planned.table())
    say_what_they_take(config, planned)
    return 0


def _train(path: str, overrides: Sequence[str], resume: bool) -> int:
    config = load_config(path, overrides)
    # Ray takes seconds to import; a wrong key is answered without them.
    from maspo_ray.controller import train
    from maspo_ray.run_dir.summary import summary_text

    summary = train(config, resume)
    print(summary_text(summary))
    return _EXIT_INTERRUPTED if summary.interrupted else 0


def _replay(run_dir: Path, step: int, start: int | None, overrides: Sequence[str]) -> int:
    from maspo_ray.replay.plan import plan_replay

    plan = plan_replay(run_dir, step, start, overrides)
    # As for training: what is not there is answered without Ray.
    from maspo_ray.replay.replay import replay

    print(f"replaying steps {plan.start + 1} to {step} from {plan.state or plan.config.model.path}", flush=True)
    difference = replay(plan, lambda line: print(line, flush=True))
    where = f" ({difference.tensor})" if difference.tensor else ""
    print(f"compared {difference.num_parameters:,} parameters with {plan.saved}")
    print(f"max |Δ parameter|: {difference.largest:.9g}{where}")
    if difference.tensor is None or not plan.is_exact:
        return 0
    raise RunError(
        f"step {step} came out otherwise than in the run, which in float32 on a CPU it must not. Its libraries, its CPU or what is "
        "in its folder may be others now."
    )
