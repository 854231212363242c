"""What a session opens, in one order: processes, agreement, data, folder, weights, outputs, engine, state.

What is done with it is in ``session``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apr_dist.apr.metadata import AprMetadata
from apr_dist.apr.reader import AprReader
from apr_dist.choices import Documents, Offload, Precision, Strategy
from apr_dist.config import TrainConfig
from apr_dist.contracts.evidence import package_digest
from apr_dist.cores import has_bf16_arithmetic
from apr_dist.errors import DistributedError
from apr_dist.gates.preflight import Preflight, tokenizer_folder
from apr_dist.gates.result import GateResult
from apr_dist.model.config import TransformerConfig
from apr_dist.model.families import Family
from apr_dist.parallel import runtime as processes
from apr_dist.parallel.agreement import prove_same
from apr_dist.parallel.engine import prepare
from apr_dist.parallel.heartbeat import HERE, Phase
from apr_dist.parallel.optimizer_files import restore
from apr_dist.parallel.run_folder import prove_shared
from apr_dist.parallel.runtime import Runtime
from apr_dist.parallel.save_group import Exchange
from apr_dist.parallel.watchdog import Watch
from apr_dist.runs.aborts import AbortRecord
from apr_dist.runs.checkpoint import with_tokenizer
from apr_dist.runs.display import Display
from apr_dist.runs.folder import RunFolder
from apr_dist.runs.lock import RunLock
from apr_dist.runs.metrics import MetricsFile
from apr_dist.runs.opening import open_folder
from apr_dist.runs.progress import Progress, Start
from apr_dist.runs.resume import flat
from apr_dist.runs.saved_state import SavedState
from apr_dist.runs.saving import Saver
from apr_dist.runs.trackers import Trackers
from apr_dist.training.answers import Questions, open_questions
from apr_dist.training.compute import set_up_compute, set_up_machine, set_up_routers
from apr_dist.training.efficiency import efficiency_of
from apr_dist.training.optimizer import build_optimizer
from apr_dist.training.proving import Around, Proven
from apr_dist.training.run_data import open_data
from apr_dist.training.same_run import facts_of
from apr_dist.training.schedule import schedule_of
from apr_dist.training.step_guard import StepGuard
from apr_dist.training.stepping import BatchFeed
from apr_dist.training.weight_proof import Weights, build_model
from apr_dist.version import __version__


class Opening:
    """Everything a run trains with, opened; whatever has to be closed is on ``stack``.

    Args:
        config: the resolved configuration.
        proven: rank 0's proven inputs.
        around: display, watch, lock and own data.
        stack: closes what was opened, also when opening fails.

    Raises:
        AprDistError: on every rank alike, for whatever rank 0 refused or a rank found wrong.
    """

    def __init__(
        self, config: TrainConfig, proven: Proven, around: Around, stack: contextlib.ExitStack
    ) -> None:
        self.config, self.display, self._watch = config, around.display, around.watch
        self.run = RunFolder(config.run_dir)
        self._aborts: AbortRecord | None = None
        self.began = time.perf_counter()
        stack.push(self._record_failure)
        self._open(proven, around, stack)

    def _open(self, proven: Proven, around: Around, stack: contextlib.ExitStack) -> None:
        config = self.config
        self.runtime = runtime = join(config)
        if around.watch is not None:
            _watch_all(around.watch, runtime, hang_s=config.parallel.hang_s)
        runtime.agree(proven.refusal)
        HERE.enter(Phase.LOADING)
        facts = runtime.broadcast_json(proven.facts(config))
        prove_same(facts_of(config, init=facts["init"], init_digest=facts["init_digest"]), runtime)
        model_config = TransformerConfig.from_metadata(
            facts["architecture"],
            family=Family(facts["family"]),
            where="rank 0",
            tie_word_embeddings=facts["tied"],
        )
        resumed = SavedState(**facts["resumed"]) if facts["resumed"] else None
        self.progress = Progress() if resumed is None else Progress.from_saved(resumed)
        if around.lock is not None:
            prove_shared(self.run.path, runtime)
        self.data = open_data(config, model_config, runtime, stack, self.display, self.progress, around.own)
        self._apart = config.loader.documents is Documents.ISOLATE or self.data.has_conversations
        self.about = say_how(config, runtime, self.display, conversations=self.data.has_conversations)
        prove_same(self.data.facts(), runtime)
        step_folder = Path(facts["step_folder"]) if resumed else None
        self.gates = [GateResult(**gate) for gate in facts["gates"]]
        identity = self._open_folder(facts, resumed, step_folder, around.lock)
        found, writes = proven.preflight, around.lock is not None
        reader = found.reader if found else None
        weights = self._weights(found, facts, compared=writes and resumed is None)
        self._open_weights(weights, model_config)
        self.start = self._start(reader, facts, model_config, identity)
        self._open_outputs(stack, resumed, writes=writes)
        self._open_engine()
        self._open_questions()
        if resumed is not None and step_folder is not None:
            self._restore(resumed, step_folder)

    def _open_folder(
        self,
        facts: Mapping[str, Any],
        resumed: SavedState | None,
        folder: Path | None,
        lock: RunLock | None,
    ) -> str:
        if lock is None:
            return ""
        identity: str = self.runtime.on_main(
            lambda: open_folder(
                self.config,
                self.run,
                lock,
                self.display,
                resumed=resumed,
                folder=folder,
                changed=facts["changed"],
                provenance=facts["provenance"],
            )
        )
        self._aborts = AbortRecord(
            self.run.verdict,
            rank=self.runtime.rank,
            gates=self.gates,
            provenance=facts["provenance"],
            synthetic=self.config.synthetic,
        )
        if self._watch is not None:
            self._watch.on_failure = self._aborts.of_failure
        return identity

    def _weights(self, found: Preflight | None, facts: Mapping[str, Any], *, compared: bool) -> Weights:
        config = self.config
        return Weights(
            reader=found.reader if found else None,
            named=facts["weights_from"],
            compared=compared and config.init is not None and bool(config.held_out),
            adapter=found.adapter_reader if found else None,
            base_bits=facts["base_bits"],
        )

    def _open_weights(self, weights: Weights, model_config: TransformerConfig) -> None:
        config, runtime = self.config, self.runtime
        # PyTorch's own generator is part of a saved step, whether or not anything draws from it.
        torch.manual_seed((config.seed * 1_000_003 + runtime.rank) % 2**63)
        began = time.perf_counter()
        self._arrived = build_model(config, model_config, weights, runtime, self.display)
        self.model = self._arrived.model
        self.gates.append(self._arrived.gate)
        self._load_ms = (time.perf_counter() - began) * 1e3

    def _start(
        self,
        reader: AprReader | None,
        facts: Mapping[str, Any],
        model_config: TransformerConfig,
        identity: str,
    ) -> Start:
        ours = {"tool_version": __version__, "code_digest": package_digest(), "seed": self.config.seed}
        if (adapter := self.model.adapter) is not None:
            ours |= {"base_digest": self._arrived.base_digest, "base_bits": adapter.base_bits}
        return Start(
            model_config=model_config,
            from_init=self.config.init is not None,
            metadata=self._metadata(reader),
            provenance={**facts["provenance"], **ours},
            recorded_val_loss=facts["recorded_val_loss"],
            random_start=self._arrived.random_start,
            adapter=adapter,
            run=identity,
        )

    def _metadata(self, reader: AprReader | None) -> AprMetadata | None:
        if not self.runtime.is_main:
            return None
        folder = tokenizer_folder(self.config.tokenizer, self.config.init)
        return with_tokenizer(reader.metadata if reader else None, folder, self.display.warn)

    def _open_outputs(self, stack: contextlib.ExitStack, resumed: SavedState | None, *, writes: bool) -> None:
        config, main = self.config, writes and self.runtime.is_main
        kept = resumed.step if resumed else None
        trackers = Trackers(
            config.trackers if main else (),
            run_dir=self.run.path,
            values=flat(config.model_dump(mode="json")),
            warn=self.display.warn,
            run=self.start.run,
            options=config.tracking,
            resumed_step=kept,
        )
        stack.enter_context(trackers)
        self.metrics = MetricsFile(
            self.run.metrics if main else None,
            common={"synthetic": True} if config.synthetic else {},
            told=[self.display.measured, trackers.measured],
            after_step=kept,
        )
        stack.enter_context(self.metrics)
        self.metrics.event("load", {"step": self.progress.step, "wall_ms": self._load_ms})
        self._exchange = Exchange(self.runtime)
        self.saver = Saver(config, self.runtime, self.start, self.run, self._exchange, self.display)
        stack.enter_context(self.saver)

    def _open_engine(self) -> None:
        config, runtime, options = self.config, self.runtime, self.config.optimizer
        set_up_compute(self.model, config.compute, runtime.device)
        if said := set_up_routers(self.model, config.router, runtime):
            self.display(said)
        optimizer = build_optimizer(
            self.model,
            lr=config.peak_lr,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            alone=runtime.strategy is Strategy.SINGLE,
            offloaded=runtime.strategy.zero_stage > 0 and runtime.offload is not Offload.NONE,
            state_bits=options.state_bits,
            runtime=runtime,
            seed=config.seed,
        )
        self.schedule = schedule_of(config)
        self.engine = prepare(
            self.model,
            optimizer,
            runtime,
            micro_batch=config.micro_batch(runtime.world_size),
            grad_clip=options.grad_clip,
        )
        self.efficiency = efficiency_of(
            self.start.model_config,
            runtime,
            seq_length=config.seq_length,
            precision=config.parallel.precision,
            isolated=self._apart,
            adapter=self.model.adapter,
        )
        self._guard = StepGuard(
            config.guards,
            batch_size=config.batch_size,
            origin=self.progress.data_origin,
            state=self.progress.guard,
        )

    def _open_questions(self) -> None:
        options, model = self.config.evaluation, self.start.model_config
        self.questions: Questions | None = None
        if options.prompts is not None and not self.config.synthetic:
            self.questions = open_questions(
                options.prompts,
                self.start.metadata,
                answer_tokens=options.answer_tokens,
                positions=model.max_position_embeddings,
                runtime=self.runtime,
            )

    def make_feed(self, kind: type[BatchFeed] = BatchFeed) -> BatchFeed:
        """A feed of this session's training batches, on the device."""
        loader = self.config.loader
        return kind(
            self.data.train,
            self.runtime.device,
            ignored_ids=loader.ignored_ids,
            isolate=loader.documents is Documents.ISOLATE,
        )

    def _restore(self, resumed: SavedState, folder: Path) -> None:
        restore(self.model, self.engine.optimizer, folder, self.runtime, self._exchange)
        self.display(f"resumes after step {resumed.step}, with the optimizer state of that step")
        if self._measured_otherwise(resumed):
            self.progress.evaluations.clear()
            self.display("the held-out data are others: validation losses are compared from here on only")

    def _measured_otherwise(self, resumed: SavedState) -> bool:
        now = self.start.provenance.get("evaluation")
        return resumed.evaluation is not None and resumed.evaluation != now

    def _record_failure(self, _kind: object, error: BaseException | None, _: object) -> None:
        """Leave a verdict of what this rank raised, unless another rank's failure caused it."""
        if self._aborts is None or not isinstance(error, Exception):
            return
        if self._watch is None or self._watch.cause_of(error) is None:
            self._aborts.of_error(error)


def join(config: TrainConfig) -> Runtime:
    """Join the launched processes as the configuration says.

    Raises:
        UsageError, DistributedError: as `apr_dist.parallel.runtime.start`.
    """
    options = config.parallel
    HERE.enter(Phase.JOINING)
    return processes.start(
        device=config.device,
        strategy=options.strategy,
        precision=options.precision,
        cpu_threads=options.cpu_threads,
        timeout_s=options.timeout_s,
        shard_size=options.shard_size,
        offload=options.offload,
        state_bits=config.optimizer.state_bits,
        weights=config.memory.weights,
        gradients=config.memory.gradients,
    )


def _watch_all(watch: Watch, runtime: Runtime, *, hang_s: float) -> None:
    """Connect the watches of all ranks, or none of them trains."""
    error = None
    try:
        watch.join(world_size=runtime.world_size, hang_s=hang_s, tell_all=runtime.broadcast_json)
    except DistributedError as raised:
        error = raised
    cut_off = int(runtime.sum(torch.tensor([error is not None], device=runtime.device).float()).item())
    if cut_off:
        raise error or DistributedError(
            f"{cut_off} of {runtime.world_size} ranks cannot reach rank 0",
            expected="TCP connections between the hosts, on any port",
            remedy="see what those ranks print",
        )


def say_how(config: TrainConfig, runtime: Runtime, display: Display, *, conversations: bool) -> str:
    """Print, and return, the choices that were made for this machine and data, in one line."""
    about = set_up_machine(config, runtime, conversations=conversations)
    display(f"running on {about}")
    bf16 = config.parallel.precision is Precision.BF16
    if bf16 and runtime.device.type == "cpu" and not has_bf16_arithmetic():
        display.warn("this processor has no bf16 arithmetic: a step takes longer in bf16 than in f32")
    return about
