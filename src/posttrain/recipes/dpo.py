"""Preference optimisation: DPO and its family, and KTO. Read `run` from top to bottom.

The reference is the given starting model: the same weights with the adapter off, or its log-probs computed once before
training, or a frozen copy. Which one, and what it costs, is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from posttrain.config.preference import DPOKeys
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import PairRow, load_kto, load_preference
from posttrain.data.rows import ChosenRows
from posttrain.errors import ConfigError, DataError
from posttrain.models.batch import Batch, pack
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.objectives.distill import aligned_scores
from posttrain.objectives.kl import k3
from posttrain.objectives.kto import LabelledInputs, kto_loss, kto_reference_point
from posttrain.objectives.pair_scores import summed, wpo_weights
from posttrain.objectives.preference import (
    PairInputs,
    Pairs,
    Partners,
    PreferenceSpec,
    partners_over,
    preference_loss,
)
from posttrain.objectives.reduce import Normalizer, segment_sum
from posttrain.objectives.terms import LossTerms, spec_from
from posttrain.recipes.balance import family_cost
from posttrain.recipes.batches import Schedule, flat, for_rank
from posttrain.recipes.measure.validate import SuiteScore, Validation
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating, learning_rate, make_optimizer, update
from posttrain.recipes.reference import Reference
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.steering import steered
from posttrain.types import Ratio, TokenSeq

Labelled = tuple[TokenSeq, bool]
_LEAST_KTO_ROWS = 2
MicroLoss = Callable[[list[Any]], LossTerms]


def run(keys: DPOKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` on the preferences in `keys.datasets`; the result is in `stage.folder`."""
    ranks, spec = stage.ranks, spec_from(PreferenceSpec, keys)
    unpaired = keys.row_kind == "labels"
    tokenizer = load_tokenizer(keys)
    load: Callable[..., Dataset[Any]] = load_kto if unpaired else load_preference
    data, held_out = load_with_held_out(load, keys, tokenizer)
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    _check_columns_are_there(data, spec)
    # KTO compares a row with the one before it, so its rows keep their order.
    cost, least_rows = (None, _LEAST_KTO_ROWS) if unpaired else (pair_cost, 1)
    schedule = Schedule.of(data, keys, ranks, size=_num_tokens, cost=cost, least_rows=least_rows)
    if unpaired:
        _check_others_to_compare_with(schedule, held_out)
    policy = load_policy(keys, tokenizer=tokenizer, sharding=stage.sharding).without_dropout()
    if spec.needs_reference and not Reference.is_precomputed(policy, keys):
        freeze_reference(policy)
        policy.frozen_follows = keys.sync_ref_model
    suite = SuiteScore.of(policy, keys, stage.processes)
    optimizer = make_optimizer(policy, keys)

    total_steps = schedule.total_steps(keys)
    # Before any step, and before a checkpoint is loaded: the reference is the given model, not the resumed one.
    last_data = total_steps + stage.guard.controls.skipped
    is_part = keys.max_steps > 0 or keys.num_train_epochs < 1
    seen = ChosenRows(data.rows, schedule.places_until(last_data)) if is_part else data.rows
    dev_rows = [rows.rows for rows in held_out.values()]
    reference = Reference.of(policy, keys, stage, seen, *dev_rows) if spec.needs_reference else None
    state = stage.resume(policy, optimizer, total_steps)
    measure = partial(validation_loss, policy, reference, spec=spec, keys=keys, stage=stage)
    validation = Validation(stage, state, held_out, measure, suite)

    for step in range(state.step, total_steps):
        if validation.is_over:
            break
        stage.begin_step(step)
        micros = schedule.step(step + stage.guard.controls.skipped)
        mine = for_rank(micros, ranks)
        loss = step_loss(policy, reference, micros, steered(spec, stage.guard.controls), stage)
        metrics = StepMetrics()
        policy.model.train()
        for micro in accumulating(policy, mine):
            micro.learn(loss(micro.rows), metrics)
        lr = learning_rate(step, total_steps, keys) * stage.guard.controls.lr_scale
        values = metrics.reduced(ranks)
        values |= update(policy, optimizer, stage, lr, values, step + 1)
        if keys.sync_ref_model and (step + 1) % keys.ref_model_sync_steps == 0:
            policy.follow(keys.ref_model_mixup_alpha)
        values |= schedule.balance(micros, ranks.world_size)
        values["epoch"] = schedule.epoch_after(step + stage.guard.controls.skipped)

        state.step, state.tokens = step + 1, state.tokens + sum(_num_tokens(row) for row in flat(micros))
        values |= validation.if_due(state.step, total_steps)
        best = validation.best_score(state.step)
        stage.finish_step(state, values, validation.is_last(state.step, total_steps), best)

    validation.restore_best()
    return stage.done(state)


def _check_columns_are_there(data: Dataset[Any], spec: PreferenceSpec) -> None:
    """Raises: DataError where a key reads a column that no row has, and so would do nothing."""
    read = {
        "row_weights: true": (spec.row_weights, "weight", 1.0),
        f"margin_coef: {spec.margin_coef:g}": (spec.margin_coef > 0, "margin", 0.0),
    }
    for key, (wanted, column, missing) in read.items():
        if wanted and all(getattr(row, column) == missing for row in data.rows):
            raise DataError(
                f"datasets: {key}, and no row has a `{column}` other than {missing:g}; add the column, name yours under `columns`, "
                "or take the key out"
            )


def check_compared_rows(rows_per_step: int) -> None:
    """Raises: ConfigError where a step of KTO has one row, which nothing is compared with."""
    if rows_per_step < _LEAST_KTO_ROWS:
        raise ConfigError(
            "loss_type: kto with one row per optimizer step (per_device_train_batch_size × gradient_accumulation_steps × "
            "processes = 1): its reference point is measured on the answers of the step's other rows; raise "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )


def _check_others_to_compare_with(schedule: Schedule[Labelled], held_out: Mapping[str, Dataset[Labelled]]) -> None:
    """KTO's z is measured on answers to other prompts. Raises: ConfigError, DataError where a step has none."""
    check_compared_rows(schedule.micro_per_step * schedule.rows_per_micro)
    for name, data in (("datasets", schedule.data), *(("eval_datasets", rows) for rows in held_out.values())):
        if len(data) < _LEAST_KTO_ROWS:
            raise DataError(f"{name}: loss_type: kto needs at least {_LEAST_KTO_ROWS} rows, got {len(data)}; add some")


def step_loss(
    policy: Policy, reference: Reference | None, micros: Sequence[list[Any]], spec: PreferenceSpec, stage: Stage, *,
    measures_kl: bool = False,
) -> MicroLoss:  # fmt: skip
    """The loss of one optimizer step as a function of a micro-batch; what it is divided by is fixed here.

    `measures_kl`: the pairs are the policy's own samples, and tell how far it is from its reference.
    """
    rows = flat(micros)
    if not isinstance(rows[0], PairRow):
        assert reference is not None, "kto needs a reference"
        norm = Normalizer(tokens=0, sequences=len(rows))
        z = _kto_reference_point(policy, reference, micros, stage)
        return lambda micro: labelled_loss(policy, reference, micro, z, spec, norm)
    norm = Normalizer(tokens=sum(row.chosen.num_loss_tokens for row in rows), sequences=len(rows))
    partners = _step_partners(policy, reference, micros, spec, stage) if spec.sorted_over_step else {}
    return lambda micro: pair_loss(
        policy, reference, micro, spec, norm, partners.get(id(micro)), measures_kl=measures_kl
    )


def pair_loss(
    policy: Policy, reference: Reference | None, rows: list[PairRow], spec: PreferenceSpec, norm: Normalizer,
    partners: Partners | None = None, *, measures_kl: bool = False,
) -> LossTerms:  # fmt: skip
    """This micro-batch's share of the step's loss. Chosen and rejected attend to one copy of their prompt."""
    batch = _packed(rows)
    weight_P = torch.tensor([row.weight for row in rows], device=policy.placement.device) if spec.row_weights else None
    if spec.use_weighting:
        head, aux_loss = policy.head(batch)
        device = head.hidden_MD.device
        logp_M, log_sum_sq_M = aligned_scores(head, batch.target_M.to(device))
        wpo_P = wpo_weights(logp_M, log_sum_sq_M, batch.seq_M.to(device), batch.num_sequences)
        weight_P = wpo_P if weight_P is None else wpo_P * weight_P
    else:
        scores = policy.score(batch)
        logp_M, aux_loss = scores.logp_M, scores.aux_loss
    of_sequences = (batch.seq_M.to(logp_M.device), batch.num_sequences)
    kl: dict[str, Ratio] = {}
    if reference is None:
        ref_S = None
    elif measures_kl:
        ref_M = reference.live_logp_M(batch)
        ref_S = summed(ref_M, *of_sequences, spec.ld_alpha)
        # k3, token by token: k1 of samples that the policy has moved on from falls below 0, and would hide how far it is.
        kl["kl"] = Ratio(float(k3(logp_M.detach(), ref_M).sum()), float(len(ref_M)))
    else:
        ref_S = reference.logp(rows, batch)
    inputs = replace(_pair_inputs(logp_M, batch, rows, ref_S, spec), partners=partners, weight_P=weight_P)
    terms = preference_loss(inputs, spec, norm)
    terms.metrics.update(kl)
    return policy.with_aux_loss(terms, aux_loss, share=len(rows) / norm.sequences)


def _packed(rows: list[PairRow]) -> Batch:
    return pack([(row.chosen, row.rejected) for row in rows])


def _pair_inputs(
    logp_M: torch.Tensor, batch: Batch, rows: list[PairRow], ref_S: torch.Tensor | None, spec: PreferenceSpec
) -> PairInputs:
    of_sequences = (batch.seq_M.to(logp_M.device), batch.num_sequences)
    logp_S = summed(logp_M, *of_sequences, spec.ld_alpha)
    lengths_S = batch.lengths_S().to(logp_S)
    return PairInputs(
        logp_S[0::2], logp_S[1::2], lengths_S[0::2], lengths_S[1::2],
        None if ref_S is None else ref_S[0::2], None if ref_S is None else ref_S[1::2],
        chosen_nll_P=None if spec.ld_alpha is None else -segment_sum(logp_M, *of_sequences)[0::2],
        margin_P=torch.tensor([row.margin for row in rows], device=logp_M.device) if spec.margin_coef else None,
    )  # fmt: skip


@torch.no_grad()
def _step_partners(
    policy: Policy, reference: Reference | None, micros: Sequence[list[PairRow]], spec: PreferenceSpec, stage: Stage
) -> dict[int, Partners]:
    """What the pairs of each micro-batch are compared with, by the identity of its list, which lives as long as the step."""
    policy.model.eval()
    places = {id(rows): place for place, rows in enumerate(micros)}
    mine: dict[int, list[list[float]]] = {}
    for micro in for_rank(micros, stage.ranks):
        batch = _packed(micro.rows)
        ref_S = None if reference is None else reference.logp(micro.rows, batch)
        inputs = _pair_inputs(policy.score(batch).logp_M, batch, micro.rows, ref_S, spec)
        assert inputs.ref_chosen_logp_P is not None and inputs.ref_rejected_logp_P is not None
        references = (inputs.ref_chosen_logp_P, inputs.ref_rejected_logp_P)
        columns = torch.stack([inputs.chosen_logp_P, inputs.rejected_logp_P, *references], 1)
        mine[places[id(micro.rows)]] = columns.tolist()
    known = {place: values for rank in stage.ranks.gather(mine) for place, values in rank.items()}
    table = torch.tensor([pair for place in range(len(micros)) for pair in known[place]])
    chosen, rejected, ref_chosen, ref_rejected = table.to(policy.placement.device).unbind(1)
    assert spec.sorted_over_step is not None
    partners = partners_over(Pairs(chosen, rejected, ref_chosen, ref_rejected), spec.sorted_over_step)
    sizes = [len(rows) for rows in micros]
    dealt = zip(micros, partners.of_better.split(sizes), partners.of_worse.split(sizes), strict=True)
    return {id(rows): Partners(better, worse) for rows, better, worse in dealt}


def labelled_loss(
    policy: Policy, reference: Reference, rows: list[Labelled], z: float, spec: PreferenceSpec, norm: Normalizer
) -> LossTerms:
    """KTO on rows that are each desirable or not."""
    batch = pack([[sequence] for sequence, _ in rows])
    scores = policy.score(batch)
    logp_S = segment_sum(scores.logp_M, batch.seq_M.to(scores.logp_M.device), batch.num_sequences)
    label_S = torch.tensor([label for _, label in rows], device=logp_S.device)
    terms = kto_loss(LabelledInputs(logp_S, reference.logp(rows, batch), label_S), z, spec, norm)
    return policy.with_aux_loss(terms, scores.aux_loss, share=len(rows) / norm.sequences)


@torch.no_grad()
def _kto_reference_point(policy: Policy, reference: Reference, micros: Sequence[list[Labelled]], stage: Stage) -> float:
    """KTO's z over the whole step: how far the policy has moved on answers to *other* prompts."""
    policy.model.eval()
    total = StepMetrics()
    # Exchanged over the step, not over a micro-batch: how rows are split into micro-batches must not matter.
    exchanged = iter(mismatched([sequence for sequence, _ in flat(micros)]))
    for micro in for_rank([[next(exchanged) for _ in rows] for rows in micros], stage.ranks):
        batch = pack([[sequence] for sequence in micro.rows])
        moved_M = policy.score(batch).logp_M - reference.live_logp_M(batch)
        total.add({} if micro.idle else {"z": Ratio(float(moved_M.sum()), batch.num_sequences)})
    return kto_reference_point(Ratio(total.reduced(stage.ranks)["z"], 1.0))


def mismatched(sequences: Sequence[TokenSeq]) -> list[TokenSeq]:
    """Each prompt with the completion of the row before it, as in TRL."""
    pairs = zip(sequences, [*sequences[-1:], *sequences[:-1]], strict=True)
    return [_join(prompt, completion) for prompt, completion in pairs]


def _join(prompt: TokenSeq, completion: TokenSeq) -> TokenSeq:
    """What is not trained in the completion (the turns of others in a conversation) is no part of z either."""
    ids, first = prompt.ids[: prompt.loss_mask.index(True)], completion.loss_mask.index(True)
    return TokenSeq(ids + completion.ids[first:], (False,) * len(ids) + completion.loss_mask[first:])


@torch.no_grad()
def validation_loss(
    policy: Policy, reference: Reference | None, rows: Dataset[Any], spec: PreferenceSpec, keys: DPOKeys, stage: Stage
) -> dict[str, float]:
    """The objective and its metrics over all held-out rows."""
    policy.model.eval()
    size = keys.per_device_train_batch_size
    micros = [list(rows.rows[i : i + size]) for i in range(0, len(rows), size)]
    mine = for_rank(micros, stage.ranks)
    loss = step_loss(policy, reference, micros, spec, stage)
    metrics = StepMetrics()
    for micro in mine:
        terms = loss(micro.rows)
        if not micro.idle:
            metrics.add(terms.metrics)
            metrics.add_share("loss", float(terms.loss))
    return {f"eval_{name}": value for name, value in metrics.reduced(stage.ranks).items()}


def pair_cost(row: PairRow) -> float:
    return family_cost([len(row.chosen.ids), len(row.rejected.ids)], shared=row.chosen.loss_mask.index(True))


def _num_tokens(row: Any) -> int:
    return sum(len(part.ids) for part in row if isinstance(part, TokenSeq))
