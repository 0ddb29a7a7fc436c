"""Engines as they are watched by whoever started the run: their states, and a keeper that is lost."""

import time

import pytest

from posttrain.distributed.engine_roles import EngineRoles, engine_places, places_variable
from posttrain.distributed.keeper import LocalKeeper
from posttrain.distributed.roles import Role, RoleLateError, RoleLostError, RoleProgram


class Losable(LocalKeeper):
    """A keeper that can be lost, or be late."""

    trouble = None

    def take(self, asked, timeout_s=0.0):
        if self.trouble:
            raise self.trouble("as told")
        return asked


@pytest.fixture
def watched(tmp_path):
    """The roles, the keepers that were made, and the states that were told."""
    made, told = [], []

    def make(number):
        made.append(Losable())
        return made[-1]

    role = Role("engine-0", lambda details: told.append(details["to"]))
    roles = EngineRoles([role], make, 0.0, max_restarts=1)
    yield roles, made, told
    roles.close()


def serve(keeper, tmp_path, word):
    command = ("{python}", "-c", "import time; time.sleep(600)", word)
    keeper.call("serve", RoleProgram(command, str(tmp_path), {}, log=str(tmp_path / "log"), token="t"))


def test_an_engine_is_healthy_only_once_its_trainer_has_synced_it(watched, tmp_path):
    roles, (keeper,), told = watched
    roles.look()
    assert told == []
    serve(keeper, tmp_path, "one")
    roles.look()
    roles.look()
    assert told == ["restarting", "stale"]
    keeper.call("synced", 4)
    roles.look()
    serve(keeper, tmp_path, "two")
    roles.look()
    keeper.call("end")
    roles.look()
    assert told == ["restarting", "stale", "healthy", "dead", "restarting", "stale", "dead"]


def test_an_engine_that_is_kept_warm_is_stale_until_the_next_trainer_has_synced_it(watched, tmp_path):
    roles, (keeper,), told = watched
    serve(keeper, tmp_path, "one")
    keeper.call("synced", 4)
    roles.look()
    keeper.call("synced", -1)  # the next update is on its way
    roles.look()
    keeper.call("synced", 5)
    serve(keeper, tmp_path, "one")
    roles.look()
    roles.look()
    keeper.call("synced", 3)
    roles.look()
    assert told == ["restarting", "stale", "healthy", "stale", "healthy"]


def test_a_keeper_that_is_lost_is_made_again_as_often_as_may_be(watched, tmp_path):
    roles, made, told = watched
    serve(made[0], tmp_path, "one")
    roles.look()
    made[0].trouble = RoleLostError
    roles.look()
    assert len(made) == 2
    serve(made[1], tmp_path, "one")
    roles.look()
    assert told == ["restarting", "stale", "dead", "restarting", "stale"]
    made[1].trouble = RoleLostError
    roles.look()
    roles.look()
    assert len(made) == 2


def test_a_keeper_that_is_late_is_suspected_before_it_is_given_up(watched, tmp_path):
    roles, made, told = watched
    serve(made[0], tmp_path, "one")
    roles.look()
    made[0].trouble = RoleLateError
    for _ in range(2):
        time.sleep(0.001)
        roles.look()
    made[0].trouble = None
    roles.look()
    assert told == ["restarting", "stale", "suspect", "stale"]
    made[0].trouble = RoleLateError
    for _ in range(4):
        time.sleep(0.001)
        roles.look()
    assert told[-2:] == ["suspect", "dead"]
    assert len(made) == 2


def test_a_trainer_that_nobody_placed_has_its_own_engines():
    assert engine_places(places_variable("127.0.0.1:6379", "run", 0)) is None
