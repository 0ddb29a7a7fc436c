"""Which cards of a machine servers get, and what is said where they are too few."""

import pytest

from posttrain.cards import ServerCards, visible_cards


@pytest.mark.parametrize(
    ("cards", "machine", "each"),
    [
        (ServerCards(True, 2, 2, 2), 8, [(2, 3), (4, 5)]),
        (ServerCards(True, 1, 3, 1), 4, [(1,), (2,), (3,)]),
        (ServerCards(False, 4, 2, 2), 8, [(0, 1), (2, 3)]),
        (ServerCards(False, 4, 3, 2), 4, [(0, 1), (2, 3), (0, 1)]),
        (ServerCards(False, 1, 2, 1), 8, [(0,), (0,)]),
        (ServerCards(False, 1, 1, 4), 8, [(0, 1, 2, 3)]),  # over more cards than train
        (ServerCards(False, 8, 1, 1), 1, [(0,)]),  # of eight that train this process is shown its own alone
        (ServerCards(True, 2, 2, 2), 0, [(), ()]),  # a CPU
    ],
)
def test_each_server_gets_its_own_cards_split_and_those_that_train_colocated(cards, machine, each):
    if machine:
        assert cards.lack(machine) == ""
    assert [cards.of(replica, machine) for replica in range(cards.replicas)] == each
    if machine:
        assert cards.on_one_card(machine) == max(sum(one in got for got in each) for one in range(machine))


@pytest.mark.parametrize(
    ("cards", "machine", "says"),
    [
        (ServerCards(True, 2, 2, 2), 5, "split with 2 servers over 2 cards each beside 2 for training needs 6 cards, and 5 are seen here; set rollout.replicas: 1, or placement: colocated"),
        (ServerCards(True, 4, 1, 1), 4, "split with a server on a card beside 4 for training needs 5 cards, and 4 are seen here; set fewer training processes, or placement"),
        (ServerCards(False, 1, 1, 4), 2, "tensor_parallel_size: 4 on a machine of 2 cards; a server of vLLM is on one machine: set 2 or less"),
    ],
)  # fmt: skip
def test_too_few_cards_are_named_with_what_to_set(cards, machine, says):
    assert says in cards.lack(machine)


def test_cards_have_the_names_that_the_machine_gives_them():
    assert visible_cards({}, 2) == ("0", "1")
    assert visible_cards({"CUDA_VISIBLE_DEVICES": "GPU-7f, GPU-9c"}, 2) == ("GPU-7f", "GPU-9c")
    assert visible_cards({"CUDA_VISIBLE_DEVICES": ""}, 0) == ()
