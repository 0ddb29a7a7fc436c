"""Models in memory: on demand, the least recently used out, none while it answers."""

import asyncio
from pathlib import Path

import pytest

from posttrain.errors import ModelError, RunLockedError
from posttrain.files import nobody_reading
from posttrain.serve.pool import ModelVersion, Pool, ServedModel


class Loading:
    """A backend that notes what it does."""

    def __init__(self):
        self.loaded, self.events = set(), []

    async def load(self, version):
        await asyncio.sleep(0.001)
        if version.name == "broken":
            raise ModelError("no such weights")
        self.loaded.add(version.id)
        self.events.append(("load", version.name))
        return ServedModel(version, None, None, version.id)

    async def unload(self, served):
        self.loaded.remove(served.version.id)
        self.events.append(("unload", served.version.name))

    async def close(self):
        pass


def version(name):
    return ModelVersion(name, "sha256:" + name.encode().hex().ljust(64, "0"), Path(name))


def run(work, capacity=None):
    async def main():
        backend = Loading()
        await asyncio.wait_for(work(backend, Pool(backend, capacity)), 20)

    asyncio.run(main())


def test_the_least_recently_used_goes_first():
    async def work(backend, pool):
        for name in ("a", "b", "a", "c"):
            (await pool.acquire(version(name))).release()
        assert backend.events == [("load", "a"), ("load", "b"), ("unload", "b"), ("load", "c")]

    run(work, capacity=2)


def test_the_folder_of_what_is_in_memory_stays_where_it_is_and_that_of_what_left_may_go(tmp_path):
    """Whoever asked for it, by whatever name."""
    (tmp_path / "a").mkdir()
    here = ModelVersion("a", "sha256:" + "a" * 64, tmp_path / "a")
    broken = ModelVersion("broken", "sha256:" + "b" * 64, tmp_path / "a")

    async def work(backend, pool):
        (await pool.acquire(here)).release()
        with pytest.raises(RunLockedError, match="is read by"), nobody_reading(here.folder):
            pass
        (await pool.acquire(version("b"))).release()
        with nobody_reading(here.folder), pytest.raises(RunLockedError, match="is being taken away"):
            await pool.acquire(here)
        with pytest.raises(ModelError):
            await pool.acquire(broken)
        (await pool.acquire(here)).release()
        await pool.close()
        with nobody_reading(here.folder):
            pass

    run(work, capacity=1)


def test_none_goes_while_it_answers_and_who_waits_comes_in_then():
    async def work(backend, pool):
        held = [await pool.acquire(version("a")) for _ in range(2)]
        waiting = asyncio.create_task(pool.acquire(version("b")))
        await asyncio.sleep(0.02)
        again = asyncio.create_task(pool.acquire(version("a")))
        await asyncio.sleep(0.02)
        assert backend.loaded == {version("a").id} and not waiting.done()
        assert not again.done(), "who comes later must not keep the others out for ever"
        held[0].release()
        held[0].release()
        await asyncio.sleep(0.02)
        assert not waiting.done()
        held[1].release()
        (await waiting).release()
        (await again).release()
        assert [name for what, name in backend.events if what == "load"] == ["a", "b", "a"]

    run(work, capacity=1)


def test_what_is_retired_leaves_when_its_last_answer_is_out():
    async def work(backend, pool):
        lease = await pool.acquire(version("a"))
        pool.retire(version("a"))
        await asyncio.sleep(0.02)
        assert backend.loaded
        lease.release()
        await asyncio.sleep(0.02)
        assert not backend.loaded and pool.ids == []
        pool.retire(version("a"))

    run(work)


def test_a_load_that_fails_is_told_to_all_and_tried_anew():
    async def work(backend, pool):
        for _ in range(2):
            found = await asyncio.gather(*(pool.acquire(version("broken")) for _ in range(3)), return_exceptions=True)
            assert [type(error) for error in found] == [ModelError] * 3
        assert pool.ids == []
        (await pool.acquire(version("a"))).release()

    run(work, capacity=1)


def test_who_gives_up_waiting_leaves_nothing_behind():
    async def work(backend, pool):
        asking = asyncio.create_task(pool.acquire(version("a")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        (await pool.acquire(version("b"))).release()
        assert pool.refs(version("a")) == 0
        await pool.close()
        assert not backend.loaded

    run(work, capacity=1)


def test_many_askers_of_many_models_all_get_theirs():
    async def work(backend, pool):
        async def ask(number):
            lease = await pool.acquire(version("abcdefgh"[number % 8]))
            assert lease.served.version.id in backend.loaded and len(backend.loaded) <= 3
            await asyncio.sleep(0.001 * (number % 5))
            assert lease.served.version.id in backend.loaded
            lease.release()

        await asyncio.gather(*(ask(number) for number in range(200)))

    run(work, capacity=3)
