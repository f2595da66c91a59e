"""Start a training run: `python -m vtriune.launch FILE [section.key=value …] [--dry-run] [--resume | --resume-from step-N | --fresh]`.

The one module that knows every role: it checks the configuration and the data, spawns the actors, hands them to the
controller, and ends them. The same command again resumes an unfinished run from its last complete checkpoint, and says of a finished
one that it is. It asks nothing and reads no standard input.
"""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

import msgspec

from actors.generator import Generator
from actors.recorder import Recorder
from actors.verifier_pool import VerifierPoolActor
from learner.actor import LearnerActor
from verifiers import terminal
from vtriune import whole_files
from vtriune.config import Config, ConfigError, check, load, resolve
from vtriune.config.document import HelpConfig
from vtriune.control import ControlServer
from vtriune.data.schema import DataError
from vtriune.record.checkpoint import step_of
from vtriune.record.trackers import MetricsFile
from vtriune.run.console import Screen, open_screen
from vtriune.run.controller import Controller
from vtriune.run.evaluation import HeldOutEvaluation
from vtriune.run.failure_report import describe, render, write
from vtriune.run.first_to_end import first_to_end
from vtriune.run.folder import Claim, begin, claim, folder_of, foresee, take_back, writable
from vtriune.run.lock import holder, holding
from vtriune.run.preflight import open_preprocessor, open_stores, rehearse
from vtriune.run.processes import ActorClasses, RunProcesses
from vtriune.run.schedule import planned_length
from vtriune.run.snapshots import Snapshots
from vtriune.run.stop_signals import INTERRUPTED, StopSignals

log = logging.getLogger(__name__)

CLASSES = ActorClasses(Generator, VerifierPoolActor, LearnerActor, Recorder)
ALARMED = 3
"""Exit code after an alarm whose action is `stop`."""


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: trained to the end, now or before, or stopped on request; 1: failed; 2: cannot be run as configured;
    3: stopped by an alarm, with a checkpoint."""
    about = "Train a vision-language model by reinforcement."
    parser = argparse.ArgumentParser(prog="python -m vtriune.launch", description=about)
    parser.add_argument("file", help="the run's YAML file, for example examples/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example policy.mode=off_policy")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that can be checked without an engine, then stop"
    )
    starts = parser.add_mutually_exclusive_group()
    for start, meaning in (
        ("resume", "refuse to start anew: there must be a checkpoint to resume from"),
        ("fresh", "start anew: a run of that name is moved aside, finished or not"),
    ):
        starts.add_argument(f"--{start}", action="store_const", const=start, dest="start", help=meaning)
    meaning = "go on from that checkpoint; what the run made after it is set aside in its folder"
    starts.add_argument("--resume-from", metavar="step-N", help=meaning)
    parser.set_defaults(start="continue")
    meaning = "every key of the file, or of one section"
    parser.add_argument("--help-config", action=HelpConfig, nargs="?", metavar="section", help=meaning)
    options = parser.parse_intermixed_args(arguments)
    try:
        config = resolve(load(options.file, options.overrides))
        check(config)
        if options.dry_run:
            train = rehearse(config)
            if (outlook := holder(folder_of(config))) is None:
                foreseen = foresee(config, options.start, options.resume_from)
                foreseen.check_data(config, train)
                outlook = foreseen.outlook
            print(outlook)
            return 0
        with writable(config), holding(folder_of(config)):
            claimed = claim(config, options.start, options.resume_from)
            if claimed.finished is None:
                return _train(config, claimed)
    except (ConfigError, DataError) as error:
        print(f"cannot run:\n{error}", file=sys.stderr)
        return 2
    print(claimed.finished)
    return 0


def _train(config: Config, claimed: Claim) -> int:
    folder = claimed.folder
    whole_files.clear(folder)
    _log_to(folder / "logs" / "controller-0.log")
    (folder / "failure.json").unlink(missing_ok=True)
    screen = open_screen(config.tracking.console, config.run.name)
    try:
        controller = asyncio.run(_run(config, claimed, screen))
    except (ConfigError, DataError) as error:
        screen.close()
        print(f"cannot run:\n{error}", file=sys.stderr)
        return 2
    except asyncio.CancelledError:
        screen.close()
        print("stopped; the same command begins where this one did")
        return 0
    except KeyboardInterrupt:
        screen.close()
        print("interrupted; the same command resumes from the last complete checkpoint, if any", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:  # Whatever ended the run is reported once; every process is ended by now.
        log.exception("the run failed")
        screen.close()
        failure = describe(error, folder)
        # Printed before it is written: the disk may be what failed.
        print(f"\n{render(failure)}", file=sys.stderr)
        print(write(failure, folder), file=sys.stderr)
        return 1
    screen.close()
    print(f"{controller.ending}\neverything is in {folder}")
    return 0 if controller.bell.stopped_by is None else ALARMED


async def _run(config: Config, claimed: Claim, screen: Screen) -> Controller:
    """Everything between a checked configuration and the end of the run. Actors live inside `async with`."""
    with StopSignals(screen.say) as signals:
        return await _train_and_record(config, claimed, screen, signals)


async def _train_and_record(config: Config, claimed: Claim, screen: Screen, signals: StopSignals) -> Controller:
    folder, checkpoint = claimed.folder, claimed.checkpoint
    preprocessor = await asyncio.to_thread(open_preprocessor, config)
    train, test = await asyncio.to_thread(open_stores, config, preprocessor, screen.say)
    screen.say(planned_length(config, len(train)))
    stores = [train] if test is None else [train, test]
    with writable(config):
        begin(claimed, config, train, screen.say)
    async with RunProcesses(config, folder, CLASSES, stores, preprocessor, screen.say) as processes:
        controller = Controller(
            config,
            train,
            processes.fleet,
            processes.publisher,
            HeldOutEvaluation(config, test, processes.fleet, screen.say) if test is not None else None,
            processes.learner,
            processes.verifiers,
            processes.recorder,
            Snapshots(folder / "checkpoints", config.checkpoint, screen.say),
            screen.show,
            screen.say,
        )
        screen.account_for(controller.groups)
        processes.on_change = controller.wake
        if checkpoint is not None:
            await first_to_end(_resume(controller, claimed, checkpoint, screen), processes.watch())
        screen.set_total(controller.num_versions)
        with ControlServer(controller, folder) as server:
            signals.stop = controller.stop
            await controller.run(server.serve(), processes.watch())
        await processes.recorder.close.call()
    return controller


async def _resume(controller: Controller, claimed: Claim, checkpoint: Path, screen: Screen) -> None:
    screen.say(f"resuming from {checkpoint}")
    if aside := take_back(claimed.folder, step_of(checkpoint)):
        screen.say(f"what the run had made after {checkpoint.name} is in {aside}")
    await controller.resume(checkpoint, keeps_switch=claimed.keeps_switch)
    written = MetricsFile(claimed.folder / "metrics.jsonl").lines_after(-1).splitlines()
    lines = [msgspec.json.decode(line) for line in written]
    screen.recall(lines)
    controller.bell.recall(lines)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(handlers=[handler], level=logging.INFO, format=form, force=True)


class LogFile(logging.FileHandler):
    """The controller's log. Where it cannot be written, on a full disk say, that is told once and the run goes on."""

    has_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` in the handler of what broke it."""
        if not self.has_told:
            self.has_told = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


if __name__ == "__main__":
    # Nobody may be there to answer; and in the background a terminal stops whoever reads from it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    terminal.open_output(waits=False)
    sys.exit(main())
