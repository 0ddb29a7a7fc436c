"""The SDK's own client trains here: what a loop written on it gets is what it would compute by hand."""

import numpy as np
import pytest
import tinker
import torch
from transformers import AutoModelForCausalLM

ROWS = [(5, 9, 40, 41, 7), (11, 12, 13), (8, 30, 31, 32, 33, 34), (50, 51, 52, 53)]
ADAM = tinker.AdamParams(learning_rate=1e-2)


def new(client, base="tiny", seed=3, rank=4, **options):
    return client.create_lora_training_client(base_model=base, rank=rank, seed=seed, **options).result()


def test_a_loop_learns_and_its_losses_are_those_of_transformers(client, bases, datum):
    training = new(client)
    model = AutoModelForCausalLM.from_pretrained(bases["tiny"], dtype=torch.float32)
    data = [datum(row, [0] + [1] * (len(row) - 2)) for row in ROWS]
    losses = []
    for _ in range(5):
        done = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(ADAM)
        losses.append(done.result().metrics["loss:sum"])
        assert stepped.result().metrics["grad_norm"] > 0
    with torch.no_grad():
        logp = [model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for row in ROWS]
    own = [lp[torch.arange(len(row) - 1), list(row[1:])] for lp, row in zip(logp, ROWS, strict=True)]
    assert losses[0] == pytest.approx(-sum(float(lp[1:].sum()) for lp in own), rel=1e-5)
    assert losses[-1] < losses[0] - 1


def weights_of(training, name):
    """The tensors of a state saved under `name`, as bytes."""
    path = training.save_state(name).result().path
    assert path == f"tinker://{training.model_id}/weights/{name}"
    return path


def tensors_at(serving, path):
    from safetensors.torch import load_file

    from posttrain.recipes.tinker_saves import find_state

    _, _, folder = serving.service.shelf.resolve(path)
    return load_file(find_state(folder).folder / "weights.safetensors")


def gap(left, right):
    assert left.keys() == right.keys() and left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_passes_add_up_to_one_over_all_their_data(client, serving, datum):
    """Of micro-batches of 8: 8 + 8 + 4 rows are the same micro-batches as 20 at once, 5 × 4 are others."""
    data = [datum(np.random.default_rng(n).integers(3, 280, 6 + n % 5).tolist()) for n in range(20)]
    found = {}
    for name, cuts in {"whole": [20], "same": [8, 16, 20], "other": [4, 8, 12, 16, 20]}.items():
        training = new(client)
        sums = []
        for start, stop in zip([0, *cuts], cuts, strict=False):
            sums.append(training.forward_backward(data[start:stop], "cross_entropy"))
        training.optim_step(ADAM).result()
        found[name] = (
            sum(done.result().metrics["loss:sum"] for done in sums),
            tensors_at(serving, weights_of(training, "one")),
        )
    assert gap(found["whole"][1], found["same"][1]) == 0.0
    assert gap(found["whole"][1], found["other"][1]) < 1e-6
    assert found["other"][0] == pytest.approx(found["whole"][0], rel=1e-6)


def test_tenants_side_by_side_are_each_what_they_are_alone(client, serving, client_of, datum):
    """Two of one shape share a base and its optimizer's parameters, one of another rank does not."""
    data = [[datum(row) for row in ROWS[:2]], [datum(row) for row in ROWS[2:]], [datum(ROWS[0])]]
    shapes = [{"seed": 3}, {"seed": 4}, {"seed": 5, "rank": 8}]

    def steps(training, rows):
        for _ in range(3):
            yield training.forward_backward(rows, "cross_entropy").result()
            yield training.optim_step(ADAM).result()

    alone = []
    for rows, shape in zip(data, shapes, strict=True):
        training = new(client, **shape)
        list(steps(training, rows))
        alone.append(tensors_at(serving, weights_of(training, "alone")))
    with client_of(serving) as other:
        together = [new(who, **shape) for who, shape in zip((client, other, client), shapes, strict=True)]
        for _ in zip(*(steps(training, rows) for training, rows in zip(together, data, strict=True)), strict=True):
            pass
        for training, expected in zip(together, alone, strict=True):
            assert gap(tensors_at(serving, weights_of(training, "together")), expected) == 0.0


def test_forward_gives_the_log_prob_of_every_target_and_changes_nothing(client, serving, bases, datum):
    training = new(client)
    before = tensors_at(serving, weights_of(training, "before"))
    odd = tinker.Datum(  # targets that are not the next inputs
        model_input=tinker.ModelInput.from_ints([5, 9, 40]), loss_fn_inputs={"target_tokens": [7, 8, 9]}
    )
    [first, second] = training.forward([datum(ROWS[0]), odd], "cross_entropy").result().loss_fn_outputs
    model = AutoModelForCausalLM.from_pretrained(bases["tiny"], dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 9, 40]])).logits[0].log_softmax(-1)[[0, 1, 2], [7, 8, 9]]
    assert second["logprobs"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert second["elementwise_loss"].to_numpy() == pytest.approx(-expected.numpy(), abs=1e-5)
    assert first["logprobs"].shape == [len(ROWS[0]) - 1]
    assert gap(before, tensors_at(serving, weights_of(training, "after"))) == 0.0
    with pytest.raises(tinker.RequestFailedError, match="no forward_backward came since the last one"):
        training.optim_step(ADAM).result()


def test_a_loss_of_the_clients_own_has_the_gradient_of_the_built_in_one(client, serving, datum):
    data = [datum(row, [0.5] * (len(row) - 1)) for row in ROWS]

    def own(given, logp):
        return sum(
            -(lp * torch.tensor(d.loss_fn_inputs["weights"].data)).sum() for d, lp in zip(given, logp, strict=True)
        ), {}

    saved = []
    for pass_over in (
        lambda training: training.forward_backward(data, "cross_entropy"),
        lambda training: training.forward_backward_custom(data, own),
    ):
        training = new(client)
        done = pass_over(training)
        training.optim_step(ADAM).result()
        saved.append((done.result().metrics["loss:sum"], tensors_at(serving, weights_of(training, "one"))))
    assert saved[0][0] == pytest.approx(saved[1][0], rel=1e-6)
    assert gap(saved[0][1], saved[1][1]) < 1e-6


def test_a_state_goes_on_to_the_bit_and_without_its_optimizer_begins_with_its_weights(client, serving, datum):
    data = [datum(row) for row in ROWS]

    def step(training):
        training.forward_backward(data, "cross_entropy").result()
        training.optim_step(ADAM).result()

    training = new(client)
    step(training)
    path = weights_of(training, "half")
    step(training)
    whole = tensors_at(serving, weights_of(training, "whole"))
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().lora_rank == 4
    step(resumed)
    assert gap(tensors_at(serving, weights_of(resumed, "whole")), whole) == 0.0
    fresh = client.create_training_client_from_state(path).result()
    assert gap(tensors_at(serving, weights_of(fresh, "start")), tensors_at(serving, path)) == 0.0
    step(fresh)
    assert gap(tensors_at(serving, weights_of(fresh, "whole")), whole) > 0.0


def test_what_is_wrong_is_said_and_the_numbers_go_on(client, datum):
    training = new(client)
    good = [datum(ROWS[0])]
    wrong = {
        "loss_fn: got 'gspo', this server computes cross_entropy": (good, "gspo", None),
        "loss_fn_config of ppo: got 'epsilon', expected clip_low": ([datum(ROWS[0])], "ppo", {"epsilon": 0.2}),
        "datum 0: loss_fn_inputs lacks logprobs": ([datum(ROWS[0])], "importance_sampling", None),
        "datum 1: target_tokens holds 9 to 999; expected ids 0 to 287": (
            [*good, datum((5, 9, 999))],
            "cross_entropy",
            None,
        ),
        "datum 0: 600 tokens; expected 1 to 512": ([datum([5] * 601)], "cross_entropy", None),
    }
    for message, (data, loss_fn, config) in wrong.items():
        with pytest.raises(tinker.RequestFailedError, match=message) as caught:
            training.forward_backward(data, loss_fn, config).result()
        assert caught.value.category == tinker.types.RequestErrorCategory.User
    bad, step = training.forward_backward(wrong_data(datum), "cross_entropy"), training.optim_step(ADAM)
    with pytest.raises(tinker.RequestFailedError, match="expected ids 0 to 287"):
        bad.result()
    with pytest.raises(tinker.RequestFailedError, match=r"no step was made, and the gradients .* request .* failed"):
        step.result()
    training.forward_backward(good, "cross_entropy").result()
    assert training.optim_step(ADAM).result().metrics["loss_tokens"] == len(ROWS[0]) - 1


def wrong_data(datum):
    return [datum((5, 9, 999))]


def test_a_gradient_that_is_no_number_makes_no_step(client, serving, datum):
    training = new(client)
    training.forward_backward([datum(ROWS[0], [3e38] * 4)], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="no step was made: the norm of the gradients is"):
        training.optim_step(ADAM).result()
    training.forward_backward([datum(ROWS[0])], "cross_entropy").result()
    training.optim_step(tinker.AdamParams(learning_rate=1e-2, grad_clip_norm=0.1)).result()
    assert all(t.isfinite().all() for t in tensors_at(serving, weights_of(training, "one")).values())


def test_a_head_that_is_the_embedding_is_left_out_and_said_to_be(client, serving, datum):
    training = new(client, "tied")
    training.forward_backward([datum(ROWS[0])], "cross_entropy").result()
    training.optim_step(ADAM).result()
    names = tensors_at(serving, weights_of(training, "one"))
    assert not any("lm_head" in name for name in names)
    assert any("lm_head" in name for name in tensors_at(serving, weights_of(new(client), "one")))
    assert "tied: embedding and head are one weight" in serving.service.warning
    attention = tensors_at(serving, weights_of(new(client, train_mlp=False, train_unembed=False), "one"))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in attention} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
