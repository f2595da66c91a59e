"""Start a training run: `python -m vtriune.launch FILE [section.key=value …] [--dry-run] [--resume]`.

The one module that knows every role: it checks the configuration and the data, spawns the actors, hands them to the
controller, and ends them. The same command again resumes an unfinished run from its last complete checkpoint.
"""

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

import msgspec

from actors.generator import Generator
from actors.recorder import Recorder
from actors.verifier_pool import VerifierPoolActor
from learner.actor import LearnerActor
from vtriune.config import Config, ConfigError, check, load, resolve, to_yaml
from vtriune.console import Screen, open_screen
from vtriune.control import ControlServer
from vtriune.controller import Controller
from vtriune.crew import Crew, Roles
from vtriune.data.schema import DataError
from vtriune.evaluation import Evaluation
from vtriune.failure import describe, render, write
from vtriune.first_to_end import first_to_end
from vtriune.rehearsal import open_preprocessor, open_stores, rehearse
from vtriune.run_folder import claim
from vtriune.run_state import Snapshots
from vtriune.schedule import num_versions

log = logging.getLogger(__name__)

ROLES = Roles(Generator, VerifierPoolActor, LearnerActor, Recorder)
INTERRUPTED = 130
"""Exit code after a second Ctrl-C."""


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: trained to the end, or stopped on request; 1: failed; 2: cannot be run as configured."""
    parser = argparse.ArgumentParser(
        prog="python -m vtriune.launch", description="Train a vision-language model by reinforcement."
    )
    parser.add_argument("file", help="the run's YAML file, for example examples/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example policy.mode=off_policy")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything that can be checked without an engine, then stop"
    )
    parser.add_argument(
        "--resume", action="store_true", help="refuse to start anew: there must be a checkpoint to resume from"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        config = resolve(load(options.file, options.overrides))
        check(config)
        if options.dry_run:
            rehearse(config)
            return 0
        folder, checkpoint = claim(config, must_resume=options.resume)
    except (ConfigError, DataError) as error:
        print(f"cannot run:\n{error}", file=sys.stderr)
        return 2
    return _train(config, folder, checkpoint)


def _train(config: Config, folder: Path, checkpoint: Path | None) -> int:
    _log_to(folder / "logs" / "controller-0.log")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "failure.json").unlink(missing_ok=True)
    screen = open_screen(config.tracking.console, config.run.name)
    try:
        asyncio.run(_run(config, folder, checkpoint, screen))
    except DataError as error:
        screen.close()
        print(f"cannot run:\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        screen.close()
        print(
            "interrupted; the same command resumes from the last complete checkpoint, if there is one", file=sys.stderr
        )
        return INTERRUPTED
    except BaseException as error:  # Whatever ended the run is reported once; every process is ended by now.
        log.exception("the run failed")
        screen.close()
        failure = describe(error, folder / "logs")
        print(f"\n{render(failure, write(failure, folder))}", file=sys.stderr)
        return 1
    screen.close()
    print(f"everything is in {folder}")
    return 0


async def _run(config: Config, folder: Path, checkpoint: Path | None, screen: Screen) -> None:
    """Everything between a checked configuration and the end of the run. Actors live inside `async with`."""
    preprocessor = await asyncio.to_thread(open_preprocessor, config)
    train, test = await asyncio.to_thread(open_stores, config, preprocessor, screen.say)
    stores = [train] if test is None else [train, test]
    screen.set_total(num_versions(config, len(train)))
    async with Crew(config, folder, ROLES, stores, preprocessor, screen.say) as crew:
        controller = Controller(
            config,
            train,
            crew.fleet,
            crew.publisher,
            Evaluation(config, test, crew.fleet) if test is not None else None,
            crew.learner,
            crew.recorder,
            Snapshots(folder / "checkpoints", config.checkpoint),
            screen,
        )
        crew.on_change = controller.ring
        if checkpoint is not None:
            screen.say(f"resuming from {checkpoint}")
            await controller.resume(checkpoint)
            screen.recall(msgspec.json.decode(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines())
        with ControlServer(controller, folder) as server:
            _stop_on_signals(controller, screen)
            await first_to_end(controller.run(), server.serve(), crew.watch())
        await crew.recorder.close.call()


def _stop_on_signals(controller: Controller, screen: Screen) -> None:
    """The first Ctrl-C (or SIGTERM) stops after the work in hand with a checkpoint; a second one ends at once."""

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)
        screen.say("stopping after the version in hand, with a checkpoint; once more to end at once")
        controller.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


if __name__ == "__main__":
    sys.exit(main())
