"""The self-checks of a run, wired to its rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratune.adapt import Adapters
from loratune.data.batch import Batch
from loratune.data.pack import one_batch
from loratune.data.render import Rendered
from loratune.data.tasks import DATA_TASKS
from loratune.lora import base_modules
from loratune.model import exact_hash, stop_ids
from loratune.quant import stored_in
from loratune.run.decide import learning_rate
from loratune.run.setup import Setup
from loratune.training import checks
from loratune.training.checks import Check

_PROBE_TOKENS = 512
_OVERFIT_ROWS = 4


class Proof:
    """What the base computed before it was adapted, to compare with before and after training."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = setup.model
        self.probe = self._batch(self._probe_rows())
        self.base_logits: Tensor = checks.eval_logits(self.model, self.probe)
        self.base_before = self._stored()
        self.start: dict[str, Tensor] = {}

    def before(self, lora: Adapters) -> list[Check]:
        """Checks on the freshly attached adapter, which is left as it was."""
        decisions = self.setup.decisions
        found = []
        init = decisions["init_lora_weights"]
        # With both factors random the adapter changes the model from the start, as was asked for.
        if init == "loftq":
            found.append(checks.starts_closer(self.model, lora))
        elif init is not False:
            exact = init != "orthogonal"  # there B A is zero by cancellation
            found.append(checks.step0_is_base(self.model, self.probe, self.base_logits, exact=exact))
        found.append(checks.gradients_only_in_adapter(self.model, lora, self.probe))
        if DATA_TASKS[self.setup.base.head.task].writes and decisions["loss"] != "all":
            stops = stop_ids(self.model, self.setup.base.tokenizer) | set(self.setup.prepared.train.end_of_turn)
            found.append(checks.end_of_turn_supervised(self.setup.prepared.rows, frozenset(stops)))
        if decisions["checks"] == "full":
            # Whether the adapter can learn at all, not whether the run's own rate is a good one.
            rate, _ = learning_rate(self.model.config.get_text_config().hidden_size, decisions["method"])
            short = sorted(self.setup.prepared.rows, key=lambda row: row.needed)[:_OVERFIT_ROWS]
            found.append(checks.one_batch_overfits(self.model, lora, self._batch(short), rate))
        return found

    def remember(self, lora: Adapters) -> None:
        """Keep what must move as it is before the first step."""
        self.start = {name: tensor.detach().clone() for name, tensor in checks.must_move(lora).items()}

    def after(self, lora: Adapters) -> list[Check]:
        """Checks on the trained adapter, which is left as it is."""
        found = [checks.every_update_moved(lora, self.start), checks.all_finite(lora)]
        if not found[-1].passed:
            return found  # the next ones write the adapter, which is refused
        found.append(checks.reload_is_live(self.model, lora, self.probe))
        if self.setup.decisions["checks"] == "full":
            found.append(checks.merged_is_adapter(self.model, lora, self.probe))
        now = self._stored()
        found.append(checks.off_is_base(self.model, lora, self.probe, self.base_logits, self.base_before, now))
        return found

    def _stored(self) -> str:
        """A hash of what the base holds; of quantised weights, the bytes."""
        return exact_hash(stored_in(base_modules(self.model)))

    def _probe_rows(self) -> list[Rendered]:
        """A few rows with at most about 512 tokens, held-out ones where there are some."""
        prepared = self.setup.prepared
        rows: list[Rendered] = []
        for row in (prepared.val or prepared.train).rows:
            if rows and sum(one.needed for one in rows) + row.needed > _PROBE_TOKENS:
                break
            rows.append(row)
        return rows

    def _batch(self, rows: Sequence[Rendered]) -> Batch:
        batch = one_batch(rows, packed=self.setup.decisions["pack"], pad_id=self.setup.base.pad_id)
        return batch.to(self.setup.base.device)
