"""The training loop: optimizer steps, metrics, checkpoints, and a stop that all ranks agree on."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from alignkd.checkpoint.save import CheckpointSaver
from alignkd.checkpoint.storage import Storage
from alignkd.data.batch import Batch
from alignkd.data.loader import load_window
from alignkd.engine.balance import Balance
from alignkd.engine.evaluation import Evaluations
from alignkd.engine.finish import finish_run
from alignkd.engine.metrics import Metrics
from alignkd.engine.optimizer import learning_rates, schedule_factor, set_learning_rates
from alignkd.engine.optimizer_step import StepInfo, all_reduce_step_info, run_optimizer_step
from alignkd.engine.signals import StopRequest, exit_code
from alignkd.engine.skipped_steps import SkippedSteps
from alignkd.engine.state import TrainingState
from alignkd.engine.step_clock import StepClock, StepTime
from alignkd.engine.stopwatch import Reading, Stopwatch, student_watches, timed_forwards
from alignkd.engine.term_norms import TermNorms
from alignkd.errors import EXIT_OK, AlignkdError, TakenOverError, TrainingError
from alignkd.run_folder.heartbeat import DATA, TRAINING
from alignkd.run_folder.metrics import MetricsFile, cut_rows_after
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from alignkd.run_folder.writer_lock import taken_over

log = logging.getLogger(__name__)
SHOWN = ("loss", "samples_per_second", "data_wait_share")  # of a metrics row, in progress.json


class Trainer:
    """Trains a prepared run, on all ranks together, from the step that it resumes at."""

    def __init__(
        self,
        state: TrainingState,
        stop: StopRequest,
        progress: Progress,
        storage: Storage | None = None,
        is_writer: Callable[[], bool] = lambda: True,
        generation: int = 0,
    ) -> None:
        """``is_writer`` says on rank 0 whether this process may still write to the run, as its writer of
        ``generation``. Collective.

        Raises FileSystemError on all ranks when rank 0 cannot rewrite the metrics file, TakenOverError when
        the run is another process's by now.
        """
        self.state, self.stop, self.progress = state, stop, progress
        self.step = state.found.step or 0  # optimizer steps done
        rows = RunPaths(state.run).metrics

        def cut_rows() -> None:
            if not is_writer():
                raise taken_over(state.run)
            cut_rows_after(rows, self.step)

        state.ranks.run_on_rank0(cut_rows)
        file = MetricsFile(rows) if state.ranks.is_first else None
        self.metrics = Metrics(file, state.config.distillation)
        self.saver = CheckpointSaver(
            state.run,
            state.config.checkpoint,
            state.ranks,
            storage or Storage(),
            state.found,
            self.metrics.sync,
            is_writer,
            generation,
            state.config.evaluation.best,
        )
        self.evaluations = Evaluations(state, stop, self._report)
        self.balance = Balance.of_run(state)
        self.term_norms = TermNorms(state, self.balance)
        self.skipped = SkippedSteps.of_run(state)
        self.sizes = state.engine.module.sizes()
        self.windows = iter(state.loader)
        self.teacher_watch, self.watches = Stopwatch(), student_watches()
        self.forward_watch = timed_forwards(state.engine.module)
        self.late: tuple[StepTime, Reading] | None = None  # times of the step before
        self.clock = StepClock()

    def train(self) -> int:
        """Train to the last step, or to the end of the step in which a stop signal came. Returns the exit
        code. Collective."""
        started = time.monotonic()
        try:
            code = self._run_steps()
            self._save_last_step(code)
            finish_run(self.state, code, self.step, self.saver, self.metrics.sync, started, self._report)
            return code
        except TakenOverError:
            raise
        except AlignkdError:
            # All ranks come here after the same step (a loss that is not finite, say); its row may say why. A
            # save of an earlier step that is still being written is valid, and the newest.
            with contextlib.suppress(TrainingError):
                self.metrics.flush()
            with contextlib.suppress(TrainingError):
                self._finish_save()
            raise
        finally:
            # The loader waits for its workers: not before a save, for which time may be short.
            self.state.loader.close()
            self.saver.close()

    def _run_steps(self) -> int:
        while self.step < self.state.total_steps:
            window, info = self._next_window()
            if info.failure is not None:
                self._save_before_failing(info.failure)
            if info.usr1 or info.term:
                # Also after a failure: the signal that asks for a stop may have killed a loader process too.
                return exit_code(info.usr1, info.term)
            if info.failure is not None:
                raise info.failure
            if info.written:
                with self.clock.paused():
                    self._finish_save()
                self.progress.enter(TRAINING, self.step)
            self._train_step(window, info)
            is_best = self._evaluate()
            due = is_best or self.step % self.state.config.checkpoint.every == 0
            if due and self.step < self.state.total_steps:
                self._save(wait=False)
        return EXIT_OK

    def _next_window(self) -> tuple[list[Batch], StepInfo]:
        """The next window and what all ranks know of it, including why one of them cannot continue."""
        self.progress.enter(DATA, self.step)
        with self.clock.data_wait():
            window, problem = load_window(self.windows)
        self.progress.enter(TRAINING, self.step)
        # A rank that has lost the run stops at once. Otherwise it would train in vain until the next save and
        # add rows to the metrics of the process that took over.
        problem = self.saver.taken_over or problem
        return window, all_reduce_step_info(
            window, self.sizes, self.stop, self.state.ranks, self.saver.written, problem
        )

    def _train_step(self, window: list[Batch], info: StepInfo) -> None:
        state = self.state
        factor = schedule_factor(self.step, state.total_steps, state.config.training.warmup_ratio)
        set_learning_rates(state.engine.optimizer, factor)
        with self.clock.paused():
            norms = self.term_norms.columns(self.step + 1, window)
            self.forward_watch.take()  # no part of the step
        columns = norms | self.balance.columns()
        sums = run_optimizer_step(
            state.engine,
            state.teacher,
            window,
            info,
            state.config.distillation,
            state.ranks,
            self.teacher_watch,
            state.config.teacher.lookahead,
            self.watches,
            self.balance.weights,
        )
        self.step += 1
        applied = state.engine.was_step_applied()
        self.skipped.count(applied)
        row = state.position(self.step) | learning_rates(state.engine.optimizer) | columns
        row["skipped_steps"] = self.skipped.total
        taken = self.clock.end_step()
        parts = {"teacher": self.teacher_watch.take(), **self.watches.take()}
        self.metrics.add(row, sums, info, parts, taken, applied=applied)
        self.balance.learn(self.metrics.last)
        self._beat(taken)
        self.skipped.check(self.step)
        if self.metrics.last is not None:
            shown = {name: self.metrics.last[name] for name in SHOWN}
            self._report("training", **shown, save_held_seconds=self.saver.totals.held_seconds)

    def _evaluate(self) -> bool:
        """If this step is due. Returns whether it is the best step so far."""
        if not self.evaluations.is_due(self.step):
            return False
        with self.clock.paused():
            self._report("evaluating")
            self.metrics.annotate(self.evaluations.evaluate(self.step, self.saver))
            self.saver.stop_unless_writer()  # it takes long, and the row of this step may come next
            self.forward_watch.take()  # no part of any step
            self._report("training")
        return self.evaluations.best_step == self.step

    def _beat(self, taken: StepTime) -> None:
        """Tell the heartbeat that a step is done, and the times of the one before: this one's forwards may
        not be over.

        Loading data and forwards make no rank wait for another, so they tell a slow rank from those that wait
        for it. (At stage 3 forwards gather weights, and only loading does.)
        """
        late, self.late = self.late, (taken, self.forward_watch.take())
        times = None
        if late is not None:
            seconds = late[0].seconds
            times = (seconds, late[0].data_wait_share * seconds + late[1].seconds())
        self.progress.end_step(self.step, times)

    def _save(self, *, wait: bool) -> None:
        with self.clock.paused():
            # The last row is completed first, so that a loss that is not finite stops the run before a save.
            self.metrics.flush()
            self._report("saving")
            facts = self.state.manifest_facts(self.step) | self.skipped.facts()
            facts |= self.evaluations.facts(self.step) | self.balance.facts(self.metrics.last)
            facts |= {"step_seconds": self.clock.take_slowest()}
            self.saver.save(self.state.engine, self.step, facts, wait=wait)

    def _finish_save(self) -> None:
        """Commit the save in flight, if any. In a phase of its own: a write may take longer than any step."""
        if self.saver.in_flight:
            self.progress.enter("saving", self.step)
            self.saver.finish()

    def _save_before_failing(self, failure: AlignkdError) -> None:
        """All ranks stand between two steps, where the state is sound. Raises ``failure`` when the run is
        another process's, and TrainingError when the last loss is not finite or the disk refuses the save too
        often."""
        if isinstance(failure, TakenOverError):
            raise failure
        log.error("cannot continue after step %d: %s", self.step, failure)
        self._save_up_to_here()

    def _save_up_to_here(self) -> None:
        self.metrics.flush()
        # A save in flight is committed first: should time run out, it is the newest one to resume from.
        self._finish_save()
        if self.step > self.saver.newest:
            self._save(wait=True)

    def _save_last_step(self, code: int) -> None:
        self._save_up_to_here()
        if self.step > self.saver.newest and code != EXIT_OK:
            raise TrainingError(
                f"stopped at step {self.step}, but it could not be saved; the newest checkpoint is of step "
                f"{self.saver.newest}"
            )

    def _report(self, phase: str, **facts: object) -> None:
        facts |= {"saved_step": self.saver.newest, "resumed_step": self.state.found.step or 0}
        self.progress.report(phase, step=self.step, total_steps=self.state.total_steps, **facts)
